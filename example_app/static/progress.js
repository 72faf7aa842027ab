// Renews the part of the page that changes, until the delivery has ended. Without JavaScript the page reloads itself.
const poll = setInterval(async () => {
  const shown = document.getElementById("progress");
  if (shown.dataset.ended) return clearInterval(poll);
  const answer = await fetch(location.href).catch(() => null);
  if (!answer || !answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("progress");
  const state = document.getElementById("state");
  const words = page.getElementById("state").textContent;
  if (state.textContent !== words) state.textContent = words;
  if (fresh.outerHTML !== shown.outerHTML) shown.replaceWith(fresh);
}, 1000);
