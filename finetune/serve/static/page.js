"use strict";

const find = (selector) => document.querySelector(selector);
const sides = [...document.querySelectorAll(".side")].map((element) => ({
  select: element.querySelector(".model"),
  title: element.querySelector("h2"),
  status: element.querySelector(".status"),
  turns: element.querySelector(".turns"),
  command: element.querySelector(".command"),
  curl: element.querySelector(".curl"),
  messages: [],
  sent: null,
}));
let key = "";
let running = null;
let given = []; // turns of a chosen sample before its last message

function headers() {
  const result = { "Content-Type": "application/json" };
  if (key) result.Authorization = `Bearer ${key}`;
  return result;
}

function showError(text) {
  find("#error").textContent = text;
  find("#error").hidden = !text;
}

async function getJson(path) {
  const reply = await fetch(path, { headers: headers() });
  const content = await reply.json();
  if (reply.ok) return content;
  find("#key-form").hidden = reply.status !== 401;
  throw new Error(content.error.message);
}

async function start() {
  try {
    const models = (await getJson("v1/models")).data.map((model) => model.id);
    sides.forEach((side, number) => {
      side.select.replaceChildren(...models.map((name) => new Option(name, name)));
      const other = models.includes("base") ? "base" : models[models.length - 1];
      side.select.value = number ? models[0] : other;
      side.title.textContent = side.select.value;
    });
    showSamples(await getJson("samples"));
    showError("");
  } catch (error) {
    showError(error.message);
  }
}

function showSamples(samples) {
  find("#samples").hidden = !samples.length;
  find("#sample-list").replaceChildren(...samples.map((sample) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const last = sample.messages[sample.messages.length - 1];
    button.type = "button";
    button.textContent = last.content;
    button.addEventListener("click", () => choose(sample));
    item.append(button);
    return item;
  }));
}

function choose(sample) {
  reset();
  const turns = [...sample.messages];
  find("#prompt").value = turns.pop().content;
  find("#system").value = turns.length && turns[0].role === "system" ? turns.shift().content : "";
  given = turns;
  find("#reference").textContent = `Expected answer: ${sample.reference}`;
  find("#reference").hidden = false;
  find("#prompt").focus();
}

function reset() {
  if (running) running.abort();
  given = [];
  find("#reference").hidden = true;
  for (const side of sides) {
    side.messages = [];
    side.turns.replaceChildren();
    side.status.textContent = "";
    side.command.hidden = true;
  }
}

function addTurn(side, role, text) {
  const turn = document.createElement("p");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  side.turns.append(turn);
  side.turns.scrollTop = side.turns.scrollHeight;
  return turn;
}

function body(side, messages) {
  const system = find("#system").value.trim();
  return {
    model: side.select.value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(find("#temperature").value),
    top_p: Number(find("#top-p").value),
    max_tokens: Number(find("#max-tokens").value),
    seed: Number(find("#seed").value),
    stream: true,
  };
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(side, text, signal) {
  const messages = [...(side.messages.length ? side.messages : given), { role: "user", content: text }];
  side.sent = body(side, messages);
  addTurn(side, "user", text);
  const turn = addTurn(side, "assistant", "");
  side.turns.setAttribute("aria-busy", "true");
  side.status.textContent = "answering";
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(side.sent), signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    let finish = "";
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const below = side.turns.scrollHeight - side.turns.scrollTop - side.turns.clientHeight < 40;
      turn.textContent += event.choices[0]?.delta.content ?? "";
      finish = event.choices[0]?.finish_reason ?? finish;
      if (below) side.turns.scrollTop = side.turns.scrollHeight;
      side.title.textContent = event.model;
    }
    side.status.textContent = finish === "length" ? "reached the longest answer" : "done";
    side.messages = [...messages, { role: "assistant", content: turn.textContent }];
  } catch (error) {
    side.status.textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") showError(`${side.sent.model}: ${error.message}`);
  } finally {
    side.turns.setAttribute("aria-busy", "false");
  }
}

async function send() {
  const text = find("#prompt").value;
  if (running || !text.trim()) return;
  running = new AbortController();
  const { signal } = running;
  showError("");
  find("#send").disabled = true;
  find("#stop").disabled = false;
  await Promise.all(sides.map((side) => answer(side, text, signal)));
  running = null;
  find("#send").disabled = false;
  find("#stop").disabled = true;
}

function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

async function copyCurl(side) {
  const text = find("#prompt").value;
  const sent = side.sent ?? body(side, [...given, { role: "user", content: text }]);
  const secret = key ? ' -H "Authorization: Bearer $FINETUNE_API_KEY"' : "";
  const url = new URL("v1/chat/completions", location.href).href;
  side.command.textContent =
    `curl ${url} -H 'Content-Type: application/json'${secret} -d ${quote(JSON.stringify(sent))}`;
  side.command.hidden = false;
  try {
    await navigator.clipboard.writeText(side.command.textContent);
    side.status.textContent = "copied";
  } catch {
    side.status.textContent = "the command is below; copy it from there";
  }
}

find("#form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
find("#prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && event.ctrlKey) send(); });
find("#stop").addEventListener("click", () => running?.abort());
find("#new").addEventListener("click", () => { reset(); find("#prompt").focus(); });
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("#key").value;
  find("#key-form").hidden = true;
  start();
});
for (const side of sides) {
  side.curl.addEventListener("click", () => copyCurl(side));
  side.select.addEventListener("change", () => {
    side.title.textContent = side.select.value;
    side.messages = [];
    side.sent = null;
    side.turns.replaceChildren();
  });
}
start();
