"use strict";
const at = id => document.getElementById(id);
const box = at("cards"), viewer = at("viewer");
const all = box ? [...box.children] : [];
const value = id => at(id) ? at(id).value : "";

function fits(card) {
  const of = card.dataset, verdict = value("verdict");
  if (value("category") && of.category !== value("category")) return false;
  if (verdict === "missed") return of.label === "1" && of.verdict === "passed";
  if (verdict === "false") return of.label === "0" && of.verdict === "flagged";
  return !verdict || of.verdict === verdict;
}

function arrange() {
  const order = value("order");
  const key = order === "name" ? (a, b) => a.dataset.name.localeCompare(b.dataset.name)
    : (a, b) => (order === "-place" ? -1 : 1) * (a.dataset.place - b.dataset.place);
  all.sort(key).forEach(card => { card.hidden = !fits(card); box.append(card); });
  box.classList.toggle("no-heat", !at("heat").checked);
  at("count").textContent = visible().length + " of " + all.length + " shown";
}

const visible = () => all.filter(card => !card.hidden);
let current = null;

function show(card) {
  current = card;
  const copy = card.cloneNode(true);
  copy.removeAttribute("tabindex");
  at("shown").replaceChildren(copy);
  const cards = visible();
  at("where").textContent = (cards.indexOf(card) + 1) + " of " + cards.length;
  if (!viewer.open) viewer.showModal();
}

function move(step) {
  const cards = visible(), next = cards[cards.indexOf(current) + step];
  if (next) show(next);
}

if (box) {
  for (const id of ["order", "category", "verdict", "heat"]) if (at(id)) at(id).addEventListener("change", arrange);
  at("controls").addEventListener("submit", event => event.preventDefault());
  box.addEventListener("click", event => { const card = event.target.closest(".card"); if (card) show(card); });
  at("before").addEventListener("click", () => move(-1));
  at("after").addEventListener("click", () => move(1));
  at("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => current && current.focus());
  document.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (viewer.open) {
      if (step) { event.preventDefault(); move(step); }
      if (event.key === " ") { event.preventDefault(); at("shown").classList.toggle("no-heat"); }
      return;
    }
    const card = document.activeElement && document.activeElement.closest("#cards .card");
    if (!card) return;
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(card); }
    if (step) { event.preventDefault(); const cards = visible(), next = cards[cards.indexOf(card) + step]; if (next) next.focus(); }
  });
  arrange();
}

const status = at("status");
if (status) status.addEventListener("change", () => {
  for (const row of at("bad-rows").children) row.hidden = status.value !== "" && row.dataset.status !== status.value;
});
