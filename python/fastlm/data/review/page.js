"use strict";
// What a person judges is kept in this browser until the server has it: each judgement is a request with a name of its own in an
// outbox, sent in order, again and again. The server counts a name once, so nothing is lost and nothing is double.
const AHEAD = 3; // items held beyond the one on show, for the time without a connection
const $ = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const windowName = sessionStorage.fastlmWindow || (sessionStorage.fastlmWindow = crypto.randomUUID());
let who = sessionStorage.fastlmName || "";
let about = {labels: []}, box = "", progress = null;
let held = [], past = []; // items to judge, the first on show; those judged in this window, the last at the end
let said = {thumb: 0, better: null};
let left = true; // whether the server may have more for this person
let outbox = [], sending = false, offline = false, refused = "", timer = 0;

async function ask(path, body) {
  let answer;
  try {
    answer = await fetch(`/api/${path}`, {
      method: "POST",
      headers: {"Content-Type": "application/json", "X-Fastlm-Token": token},
      body: JSON.stringify({reviewer: who, window: windowName, ...body}),
      signal: AbortSignal.timeout(20000),
    });
  } catch (error) {
    return line(true), null;
  }
  const found = await answer.json().catch(() => null);
  if (answer.status >= 500 || !found) return line(true, found && found.error), null;
  line(false);
  if (answer.ok) return found;
  return {status: answer.status, error: found.error};
}

// ------------------------------------------------------------------------------------------------------------- outbox

function keep() {
  try {
    outbox.length ? localStorage.setItem(box, JSON.stringify(outbox)) : localStorage.removeItem(box);
  } catch (error) {
    notice("This browser keeps nothing for later: do not close the page before all is sent.");
  }
}

function adopt() { // what a window of this person that was closed could not send
  const mine = `fastlm ${about.id} ${who} `, later = [];
  box = mine + windowName;
  for (const key of Object.keys(localStorage).filter((key) => key.startsWith(mine))) {
    outbox.push(...JSON.parse(localStorage.getItem(key)).filter((one) => !outbox.some((o) => o.request === one.request)));
    if (key !== box) later.push(key);
  }
  outbox.sort((a, b) => a.at - b.at);
  keep();
  later.forEach((key) => localStorage.removeItem(key)); // once it is kept under this window's name
}

function post(path, body) {
  outbox.push({path, request: crypto.randomUUID(), at: Date.now(), ...body});
  keep();
  work();
}

async function work() { // sends what is to be sent, then fetches what is to be shown
  if (sending || !who) return;
  sending = true;
  clearTimeout(timer);
  while (outbox.length) {
    const {path, at, ...body} = outbox[0];
    const found = await ask(path, body);
    if (!found || found.status === 403) { if (found) notice(found.error); break; }
    if (found.error) notice(found.error);
    if (found.progress) progress = found.progress;
    outbox.shift();
    keep();
  }
  if (!outbox.length && held.length <= AHEAD) await fetchMore();
  sending = false;
  show();
  timer = setTimeout(work, offline ? 1000 : held.length ? 60000 : 5000);
}

async function fetchMore() {
  const found = await ask("next", {have: held.map((one) => one.id), count: AHEAD + 1 - held.length});
  if (!found) return;
  if (found.error) return notice(found.error);
  ({about, progress} = found);
  held.push(...found.items.filter((one) => !held.some((own) => own.id === one.id)));
  left = held.length > 0;
}

// -------------------------------------------------------------------------------------------------------------- judging

function judge(label) {
  const item = held[0];
  if (!item) return;
  const written = $("answer").value.trim(), better = written && written !== item.text.trim() ? $("answer").value : null;
  if (label === null && !said.thumb && better === null) {
    return notice(written ? "The better answer is the same as the answer." : "Choose a label, a thumb or a better answer, or skip.");
  }
  give(item, {label, thumb: said.thumb, better});
}

function give(item, what) {
  notice("");
  held.shift();
  past.push({item, what});
  begin({thumb: 0, better: null});
  show();
  post("judge", {item: item.id, ...what});
}

async function undo() {
  notice("");
  const last = past.pop();
  if (last) {
    held.unshift(last.item);
    begin(last.what);
    show();
    return post("undo", {item: last.item.id});
  }
  if (outbox.length || sending) return;
  const found = await ask("undo", {request: crypto.randomUUID()});
  if (!found || found.error || !found.item) return notice((found && found.error) || "There is nothing to take back.");
  const {said: what, ...item} = found.item;
  held = [item, ...held.filter((one) => one.id !== item.id)];
  progress = found.progress;
  begin(what);
  show();
}

function begin(what) {
  said = {thumb: what.thumb, better: what.better, label: what.label};
  $("answer").value = what.better || "";
  $("better").hidden = !what.better;
}

function thumb(value) {
  said.thumb = said.thumb === value ? 0 : value;
  if (said.thumb && !about.labels.length && $("better").hidden) return judge(null);
  show();
}

function write() {
  $("better").hidden = !$("better").hidden && !$("answer").value;
  if (!$("better").hidden) {
    if (!$("answer").value && held[0]) $("answer").value = held[0].text;
    $("answer").focus();
  }
  show();
}

// ----------------------------------------------------------------------------------------------------------------- show

function line(off, why) {
  offline = off;
  refused = why || "";
}

function notice(text) {
  $("notice").textContent = text || "";
  $("notice").hidden = !text;
}

function show() {
  const item = held[0];
  $("enter").hidden = !!who;
  $("who").hidden = !who;
  $("who").textContent = who;
  $("title").textContent = about.title || "Review";
  document.title = `${about.title || "Review"} · fastlm`;
  $("item").hidden = !who || !item;
  $("keys").hidden = !who || !progress || (!item && !past.length);
  $("done").hidden = !who || !!item || !progress || offline || left;
  const wait = outbox.length ? `${outbox.length} kept here` : "";
  $("line").className = offline ? "off" : "";
  $("line").textContent = !who ? "" : offline ? [refused || "no connection", wait].filter(Boolean).join(", ") : wait || "saved";
  if (progress) {
    const waiting = outbox.filter((one) => one.path === "judge").length - outbox.filter((one) => one.path === "undo").length;
    const mine = progress.mine + waiting, percent = Math.round((100 * mine) / Math.max(progress.items, 1));
    $("bar").hidden = false;
    $("bar").setAttribute("aria-valuenow", percent);
    $("bar").firstElementChild.style.width = `${percent}%`;
    const people = progress.reviewers.length;
    $("count").textContent = `${mine} of ${progress.items} by you · ${progress.judged} judged by anyone · ` +
      `${people} ${people === 1 ? "person" : "people"}`;
    $("sum").textContent = `${mine} of ${progress.items} are judged by you, ${progress.judged} by anyone.`;
  }
  if (item) {
    if ($("item").dataset.id !== String(item.id)) {
      $("item").dataset.id = item.id;
      $("text").textContent = item.text;
      $("prompt").replaceChildren(...prompt(item.prompt));
      $("text").scrollTop = 0;
    }
    $("labels").replaceChildren(...about.labels.map(labelButton));
  }
  for (const [id, on] of [["up", said.thumb > 0], ["down", said.thumb < 0], ["write", !$("better").hidden]]) {
    $(id).setAttribute("aria-pressed", on);
    $(id).disabled = !item;
  }
  for (const id of ["send", "skip"]) $(id).disabled = !item;
}

function labelButton(label, at) {
  const button = document.createElement("button"), key = document.createElement("kbd");
  key.textContent = at + 1;
  button.type = "button";
  button.append(key, label);
  button.setAttribute("aria-pressed", said.label === label);
  button.onclick = () => judge(label);
  return button;
}

function prompt(found) {
  if (!found) return [];
  if (typeof found === "string") return [document.createTextNode(found)];
  return found.map((message) => {
    const part = document.createElement("p"), role = document.createElement("span");
    part.className = "said";
    role.className = "role";
    role.textContent = message.role;
    part.append(role, message.content);
    return part;
  });
}

// ----------------------------------------------------------------------------------------------------------------- keys

document.addEventListener("keydown", (event) => {
  if (!who || event.isComposing) return;
  const writing = event.target === $("answer");
  if (writing) {
    if (event.key === "Escape") $("answer").blur();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) judge(about.labels.length ? said.label ?? null : null);
    else return;
    return event.preventDefault();
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const label = about.labels[Number(event.key) - 1];
  if (label !== undefined && held[0]) judge(label);
  else if (event.key === "+" || event.key === "=" || event.key === "ArrowUp") thumb(1);
  else if (event.key === "-" || event.key === "ArrowDown") thumb(-1);
  else if (event.key === "b") write();
  else if (event.key === "u") undo();
  else if (event.key === "s" && held[0]) give(held[0], {label: null, thumb: 0, better: null});
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON") judge(said.label ?? null);
  else return;
  event.preventDefault();
});
$("up").onclick = () => thumb(1);
$("down").onclick = () => thumb(-1);
$("write").onclick = write;
$("send").onclick = () => judge(said.label ?? null);
$("undo").onclick = undo;
$("skip").onclick = () => held[0] && give(held[0], {label: null, thumb: 0, better: null});
$("who").onclick = () => {
  if (outbox.length) return notice("Wait until all is sent.");
  sessionStorage.removeItem("fastlmName");
  location.reload();
};
window.addEventListener("online", work);
window.addEventListener("beforeunload", (event) => outbox.length && event.preventDefault());

$("enter").onsubmit = async (event) => {
  event.preventDefault();
  await enter($("name").value);
};

async function enter(name) {
  clearTimeout(timer);
  who = name.trim().replace(/\s+/g, " ");
  if (!who) return;
  const found = await ask("next", {have: [], count: 0});
  if (!found || found.error) {
    who = "";
    notice(found ? found.error : refused || "There is no connection to fastlm review. It is tried again.");
    if (!found) timer = setTimeout(() => enter(name), 1000);
    return show();
  }
  notice("");
  sessionStorage.fastlmName = who;
  ({about, progress} = found);
  adopt();
  begin({thumb: 0, better: null});
  await work();
  document.activeElement.blur();
}

show();
if (!token) notice("The address lacks the token: open the one that the terminal shows.");
else if (who) { const name = who; who = ""; enter(name); } else $("name").focus();
