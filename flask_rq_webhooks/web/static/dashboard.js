// What the pages do with JavaScript: refresh what is in flight, apply filters at once, count down, show local
// times, copy. Loads the page it is on and replaces the parts marked data-rqw-live, and nothing else; a page
// that was fetched is parsed as an inert document, so nothing in it can run.
(() => {
  "use strict";
  const page = document.getElementById("rqw-page");
  if (!page) return;
  const note = document.getElementById("rqw-live-note");
  let timer = 0;
  let failures = 0;
  let stopped = false;
  let asked = 0;

  function countDown() {
    for (const element of document.querySelectorAll("[data-rqw-countdown]")) {
      const left = Math.round((Date.parse(element.dateTime) - Date.now()) / 1000);
      element.textContent = left > 0 ? `in ${span(left)}` : "due now";
    }
  }

  function span(seconds) {
    const parts = [];
    for (const [size, name] of [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]]) {
      if (seconds >= size || (size === 1 && !parts.length)) {
        parts.push(`${Math.floor(seconds / size)} ${name}`);
        seconds %= size;
      } else if (parts.length) break;
      if (parts.length === 2) break;
    }
    return parts.join(" ");
  }

  // A reader's own time next to UTC, while the pointer or the focus is on a time.
  function showLocal(event) {
    const time = event.target.closest?.("time[datetime]") ?? event.target.querySelector?.(":scope > time[datetime]");
    if (!time || time.dataset.rqwTitle !== undefined || !page.contains(time)) return;
    const moment = new Date(time.dateTime);
    const local = moment.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "long" });
    const utc = moment.toISOString().slice(0, 19).replace("T", " ");
    time.dataset.rqwTitle = time.title;
    time.title = `${local} (your time)\n${utc} UTC`;
    const restore = () => {
      time.title = time.dataset.rqwTitle;
      delete time.dataset.rqwTitle;
    };
    event.target.addEventListener(event.type === "focusin" ? "focusout" : "pointerout", restore, { once: true });
  }

  function takeOver(fresh) {
    for (const part of document.querySelectorAll("[data-rqw-live]")) {
      const other = fresh.getElementById(part.id);
      if (!other) continue;
      // What the reader opened or closed stays so.
      for (const details of part.querySelectorAll("details[id]")) {
        const twin = other.querySelector(`#${CSS.escape(details.id)}`);
        if (twin) twin.open = details.open;
      }
      if (part.innerHTML === other.innerHTML) continue;
      const focused = part.contains(document.activeElement) ? document.activeElement : null;
      const index = focused ? focusable(part).indexOf(focused) : -1;
      part.replaceChildren(...[...other.childNodes].map((node) => document.importNode(node, true)));
      if (index >= 0) focusable(part)[index]?.focus({ preventScroll: true });
    }
    countDown();
  }

  function focusable(part) {
    return [...part.querySelectorAll("a[href], button, summary, [tabindex]")];
  }

  async function refresh() {
    if (document.hidden) return schedule();
    const mine = ++asked;
    try {
      const answer = await fetch(location.href, { credentials: "same-origin", cache: "no-store", redirect: "error" });
      if (!answer.ok) throw new Error(String(answer.status));
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const other = fresh.getElementById("rqw-page");
      if (!other) throw new Error("another page");
      if (mine !== asked) return; // a later request has replaced this one
      failures = 0;
      takeOver(fresh);
      if (other.dataset.rqwRefresh) page.dataset.rqwRefresh = other.dataset.rqwRefresh;
      else delete page.dataset.rqwRefresh;
    } catch {
      failures += 1;
    }
    schedule();
  }

  function schedule() {
    clearTimeout(timer);
    const seconds = Number(page.dataset.rqwRefresh || 0);
    showState();
    if (stopped || !seconds || failures > 5) return;
    timer = setTimeout(refresh, seconds * 1000 * 2 ** failures);
  }

  function showState() {
    if (!note) return;
    const live = Boolean(page.dataset.rqwRefresh) && failures <= 5;
    note.hidden = !live;
    if (!live) return;
    if (!note.firstChild) {
      const button = document.createElement("button");
      button.type = "button";
      button.addEventListener("click", () => {
        stopped = !stopped;
        schedule();
      });
      note.append(document.createElement("span"), " ", button);
    }
    note.firstChild.textContent = stopped ? "Updates are paused." : "This page updates itself.";
    note.lastChild.textContent = stopped ? "Resume updates" : "Pause updates";
  }

  const filter = document.querySelector("[data-rqw-filter]");
  if (filter) {
    const apply = () => {
      const given = new URLSearchParams([...new FormData(filter)].filter(([, value]) => value !== ""));
      const address = new URL(filter.action);
      address.search = given;
      history.replaceState(null, "", address);
      clearTimeout(timer);
      refresh();
    };
    filter.addEventListener("change", apply);
    filter.addEventListener("submit", (event) => {
      event.preventDefault();
      apply();
    });
  }

  for (const element of document.querySelectorAll("[data-rqw-copy]")) {
    if (!navigator.clipboard) break;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(element.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(element);
        button.textContent = "Selected";
      }
    });
    element.after(button);
  }

  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && page.dataset.rqwRefresh && !stopped) refresh();
  });
  document.addEventListener("pointerover", showLocal);
  document.addEventListener("focusin", showLocal);
  setInterval(countDown, 1000);
  schedule();
})();
