#!/usr/bin/env node
// A webhook receiver with nothing but what comes with Node (18 or newer). Copy it and change `handle`.
//
//     WEBHOOK_SECRET='the secret you registered' PORT=8080 node receiver.js
//
// While you change the secret, put the old one into WEBHOOK_OLD_SECRET: both are accepted.
"use strict";

const crypto = require("node:crypto");
const http = require("node:http");

const SECRETS = [process.env.WEBHOOK_SECRET, process.env.WEBHOOK_OLD_SECRET].filter(Boolean);
const TOLERANCE_S = 300;
const MAX_BODY_BYTES = 1024 * 1024;

// The same webhook can come more than once, with the same id. A real receiver keeps the ids in its database.
const seenIds = new Set();

// Do what you want to do with it. Answer quickly: longer work belongs into a queue.
function handle(webhook) {
  console.log(JSON.stringify(webhook));
}

// The bytes to sign with: `whsec_` is followed by base64, other secrets are text.
function keyOf(secret) {
  const encoded = /^whsec_([A-Za-z0-9+/]+)={0,2}$/.exec(secret);
  if (encoded && encoded[1].length % 4 !== 1) return Buffer.from(encoded[1], "base64");
  return Buffer.from(secret, "utf8");
}

// Whether the sender knew one of our secrets, and that not long ago.
function isGenuine(id, timestamp, signatures, body) {
  if (!/^[!-\-/-~]{1,256}$/.test(id) || !/^(0|[1-9][0-9]{0,11})$/.test(timestamp)) return false;
  if (Math.abs(Date.now() / 1000 - Number(timestamp)) > TOLERANCE_S) return false;
  const signed = Buffer.concat([Buffer.from(`${id}.${timestamp}.`, "ascii"), body]);
  let genuine = false;
  for (const secret of SECRETS) {
    const digest = crypto.createHmac("sha256", keyOf(secret)).update(signed).digest("base64");
    const expected = Buffer.from(`v1,${digest}`, "ascii");
    for (const signature of signatures.split(" ")) {
      const given = Buffer.from(signature, "latin1");
      // timingSafeEqual takes as long for a wrong signature as for a right one.
      if (given.length === expected.length && crypto.timingSafeEqual(given, expected)) genuine = true;
    }
  }
  return genuine;
}

const server = http.createServer((request, response) => {
  // The bytes as they come: parsing and writing JSON again would change them.
  const chunks = [];
  let size = 0;
  const answer = (status) => response.writeHead(status, { "Content-Length": 0 }).end();
  request.on("data", (chunk) => {
    size += chunk.length;
    if (size <= MAX_BODY_BYTES) chunks.push(chunk);
    else if (!response.headersSent) answer(413);
  });
  request.on("end", () => {
    if (response.headersSent) return;
    if (request.method !== "POST") return answer(405);
    const body = Buffer.concat(chunks);
    const header = (name) => request.headers[name] ?? "";
    const id = header("webhook-id");
    if (!isGenuine(id, header("webhook-timestamp"), header("webhook-signature"), body)) return answer(401);
    try {
      if (!seenIds.has(id)) {
        handle(JSON.parse(body.toString("utf8")));
        // After the work: if it fails, the sender tries again.
        seenIds.add(id);
      }
    } catch (error) {
      console.error(error);
      return answer(500);
    }
    // Any 2xx says "got it"; 5xx asks for another attempt, 410 for none ever again.
    answer(204);
  });
});

if (SECRETS.length === 0) {
  console.error("Set WEBHOOK_SECRET to the secret you registered the webhook with.");
  process.exit(1);
}
server.listen(Number(process.env.PORT ?? 8080), "127.0.0.1", () => {
  console.log(`listening on http://127.0.0.1:${server.address().port}`);
});
