"use strict";
// Polls status.json and draws it. Rates are differences between two looks, kept here: the gateway keeps no history. All words that come
// from outside are set as text, never as markup.
const EVERY_MS = 2000, KEPT = 150, SHORTEST = 40, NODE_COLUMN = 520, FULL_GROUPS = 60, MIN_DELTA_S = 0.5;
const SVG = "http://www.w3.org/2000/svg";
const history = new Map();
const rows = new Map();
let last = null, lastChange = null, drawnWidth = 0;

const byId = (id) => document.getElementById(id);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const last_of = (points) => points.length ? points[points.length - 1] : null;

function make(name, attributes = {}, text = "", parent = null) {
  const isSvg = parent && (parent.namespaceURI === SVG) || name === "svg";
  const element = isSvg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== "") element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}
function count(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`;
  return value >= 100 || Number.isInteger(value) ? `${Math.round(value)}` : value.toFixed(1);
}
function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < 4) { value /= 1024; at += 1; }
  return `${at ? value.toFixed(1) : value} ${units[at]}`;
}
function duration(value) {
  const days = Math.floor(value / 86400), hours = Math.floor(value / 3600) % 24, minutes = Math.floor(value / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(value)} s`;
}

// Within the bucket that holds it, values are taken as evenly spread: what Prometheus' histogram_quantile does.
function quantile(buckets, bounds, share) {
  const total = sum(buckets);
  if (!total) return null;
  let below = 0;
  for (let at = 0; at < buckets.length; at += 1) {
    if (below + buckets[at] >= share * total) {
      if (at >= bounds.length) return bounds[bounds.length - 1];
      const low = at ? bounds[at - 1] : 0;
      return low + (bounds[at] - low) * (share * total - below) / buckets[at];
    }
    below += buckets[at];
  }
  return bounds[bounds.length - 1];
}

// What happened between two looks; null where the gateway has started anew or too little time has passed.
function difference(now, before) {
  if (!before || now.gateway.uptime_s < before.gateway.uptime_s) return null;
  const took = now.gateway.uptime_s - before.gateway.uptime_s;
  const old = new Map(before.models.map((model) => [model.name, model]));
  const models = new Map();
  for (const model of now.models) {
    const was = old.get(model.name);
    const minus = (key) => model[key].map((value, at) => value - (was ? was[key][at] : 0));
    const codes = (wanted) => sum(Object.entries(model.requests).filter(([code]) => wanted(code))
      .map(([code, number]) => number - (was ? was.requests[code] || 0 : 0)));
    const durations = minus(model.generates ? "first_delta_buckets" : "duration_buckets");
    models.set(model.name, {
      durations, rate: codes(() => true) / took, failed: codes((code) => code !== "OK") / took,
      messages: (model.num_messages - (was ? was.num_messages : 0)) / took,
      p50: quantile(durations, now.bucket_bounds_s, 0.5), p99: quantile(durations, now.bucket_bounds_s, 0.99),
    });
  }
  const rates = (key, number) => {
    const known = new Map(before[key].map((one) => [one.id, one[number]]));
    return new Map(now[key].map((one) => [one.id, Math.max(0, one[number] - (known.get(one.id) || 0)) / took]));
  };
  return {took, models, orchestrators: rates("orchestrators", "num_sent"), groups: rates("groups", "num_answers")};
}

function remember(change) {
  for (const [name, model] of change.models) {
    const points = history.get(name) || [];
    points.push(model);
    if (points.length > KEPT) points.shift();
    history.set(name, points);
  }
  for (const name of history.keys()) if (!change.models.has(name)) history.delete(name);
}

function showHead(now) {
  const gateway = now.gateway;
  byId("gateway").textContent = gateway.id;
  byId("state").textContent = gateway.unready || "ready";
  byId("state").className = `pill ${gateway.unready ? "failed" : "ready"}`;
  byId("uptime").textContent = `up ${duration(gateway.uptime_s)}`;
  byId("version").textContent = `version ${gateway.version} · Python ${gateway.python}`;
  byId("fresh").textContent = `as of ${new Date(gateway.unix_s * 1e3).toLocaleTimeString()}`;
  document.title = `${gateway.unready ? "✕ " : ""}tensorway · ${gateway.id}`;
  problem(now.registry_problem);
}

function problem(words) {
  byId("problem").hidden = !words;
  byId("problem").textContent = words;
}

function showFigures(now, change) {
  const points = change ? [...change.models.values()] : [];
  const all = points.length ? points[0].durations.map((_, at) => sum(points.map((point) => point.durations[at]))) : [];
  const rate = sum(points.map((point) => point.rate)), failed = sum(points.map((point) => point.failed));
  const ready = sum(now.models.map((model) => model.num_ready)), wanted = sum(now.models.map((model) => model.num_wanted));
  const share = rate ? failed / rate : 0;
  const figures = [
    ["requests", count(rate), "/s", ""],
    ["failed", rate ? (share * 100).toFixed(share < 0.1 ? 1 : 0) : "0", "%", share > 0.05 ? "bad" : share > 0.01 ? "warn" : ""],
    ["p50", seconds(quantile(all, now.bucket_bounds_s, 0.5)), "", ""],
    ["p99", seconds(quantile(all, now.bucket_bounds_s, 0.99)), "", ""],
    ["in flight", count(now.in_flight.num_requests), bytes(now.in_flight.num_bytes), ""],
    ["stream messages", count(sum(points.map((point) => point.messages))), "/s", ""],
    ["replicas ready", `${ready}`, `of ${wanted}`, ready < wanted ? "warn" : ""],
  ];
  byId("figures").replaceChildren(...figures.map(([label, value, unit, kind]) => {
    const figure = make("div", {class: `figure ${kind}`});
    make("span", {class: "muted"}, label, figure);
    make("small", {}, unit, make("b", {}, value, figure));
    return figure;
  }));
}

function spark(cell, lines, words) {
  cell.replaceChildren();
  const box = make("div", {class: "spark"}, "", cell);
  // It fills from the right, and grows denser until five minutes are shown.
  const most = Math.max(SHORTEST, lines[0].values.length);
  const svg = make("svg", {viewBox: `0 0 ${most - 1} 34`, preserveAspectRatio: "none", "aria-hidden": "true"}, "", box);
  const top = Math.max(1e-9, ...lines.flatMap(({values}) => values.map((value) => value || 0)));
  make("line", {class: "floor", x1: 0, x2: most - 1, y1: 33.5, y2: 33.5}, "", svg);
  for (const {kind, values, isArea} of lines) {
    const places = values.map((value, at) => value === null ? null : [most - values.length + at, 32 - 30 * value / top]);
    let path = "", pen = false;
    for (const place of places) {
      if (place) path += `${pen ? "L" : "M"}${place[0]} ${place[1].toFixed(1)}`;
      pen = place !== null;
    }
    if (isArea && places.length > 1) {
      make("path", {class: "area", d: `${path}L${most - 1} 33L${most - places.length} 33Z`}, "", svg);
    }
    make("path", {class: kind, d: path || "M0 0"}, "", svg);
  }
  make("span", {}, words, box);
}

function stateOf(model) {
  if (model.state === "READY") return "ready";
  return model.state === "LOADING" ? "loading" : model.num_wanted ? "failed" : "idle";
}

function showModels(now) {
  const body = byId("models").tBodies[0];
  for (const [name, row] of rows) if (!now.models.some((model) => model.name === name)) { row.remove(); rows.delete(name); }
  for (const model of now.models) {
    let row = rows.get(model.name);
    if (!row) {
      row = make("tr", {"data-model": model.name});
      for (const kind of ["name", "", "wide", "wide", "number", "number", "number"]) make("td", {class: kind}, "", row);
      body.append(row);
      rows.set(model.name, row);
    }
    const points = history.get(model.name) || [], point = last_of(points), cells = row.cells;
    cells[0].replaceChildren();
    make("i", {class: `dot ${stateOf(model)}`}, "", cells[0]);
    cells[0].append(model.name);
    make("small", {}, model.reason || `${model.generates ? "tokens" : "tensors"} · ${model.engine} · ${model.revision.slice(0, 12)}`, cells[0]);
    cells[1].textContent = `${model.num_ready} of ${model.num_wanted}`;
    spark(cells[2], [{kind: "low", values: points.map((one) => one.rate), isArea: true}], point ? `${count(point.rate)} /s` : "–");
    // A look without a request has no quantile; the line goes on from the next that has.
    spark(cells[3], [{kind: "high", values: points.map((one) => one.p99)}, {kind: "low", values: points.map((one) => one.p50)}],
      point && point.p50 !== null ? `${seconds(point.p50)} · ${seconds(point.p99)}` : "–");
    cells[3].title = model.generates ? "to the first token" : "from the request's bytes to its answer's";
    cells[4].textContent = count(model.waiting_rows);
    cells[5].textContent = `${Math.round(model.utilisation * 100)} %`;
    cells[6].textContent = count(sum(Object.entries(model.requests).filter(([code]) => code !== "OK").map(([, number]) => number)));
  }
}

function showErrors(now) {
  byId("no-errors").hidden = now.errors.length > 0;
  byId("errors").hidden = !now.errors.length;
  byId("errors").tBodies[0].replaceChildren(...now.errors.map((error) => {
    const row = make("tr");
    make("td", {class: "muted"}, new Date(error.unix_s * 1e3).toLocaleTimeString(), row);
    make("td", {}, error.model || "–", row);
    make("td", {class: "code"}, error.code, row);
    make("td", {class: "wide"}, error.sentence, row);
    make("td", {class: "mono muted"}, error.request_id, row);
    return row;
  }));
}

const GROUP_STATES = {ready: "ready", starting: "loading", loading: "loading", warming: "loading", stopping: "idle", backing_off: "failed", failed: "failed"};
const cut = (text, chars) => text.length > chars ? `${text.slice(0, chars - 1)}…` : text;
const curve = (x1, y1, x2, y2) => `M${x1} ${y1}C${(x1 + x2) / 2} ${y1} ${(x1 + x2) / 2} ${y2} ${x2} ${y2}`;

function member(svg, one, x, y, width, classes, words) {
  const box = make("g", {}, "", svg);
  make("title", {}, `${one.id}\n${one.endpoint || ""}${one.zone ? `\nzone ${one.zone}` : ""}`, box);
  make("rect", {class: `box ${classes}`, x, y, width, height: 46, rx: 10}, "", box);
  make("text", {x: x + 12, y: y + 19}, cut(one.id, Math.floor((width - 20) / 7.2)), box);
  make("text", {class: "small", x: x + 12, y: y + 35}, words, box);
}

// Where every group stands: nodes are boxes in as many columns as there is room for, filled from the shortest.
function placed(now, left, width) {
  const isCompact = now.groups.length > FULL_GROUPS;
  const columns = width < NODE_COLUMN + 60 ? 1 : Math.max(1, Math.min(3, Math.floor(width / 290)));
  const wide = (width - (columns - 1) * 18) / columns, heights = Array(columns).fill(26);
  const owners = new Map(now.members.filter((one) => one.kind === "node").map((one) => [one.id, []]));
  for (const group of now.groups) (owners.get(group.node) || owners.set(group.node, []).get(group.node)).push(group);
  const nodes = [], places = new Map();
  for (const [id, groups] of owners) {
    const column = heights.indexOf(Math.min(...heights)), x = left + column * (wide + 18), y = heights[column];
    let at = 0, line = 0;
    for (const group of groups) {
      if (isCompact) {
        const size = Math.max(1, group.ranks.length) * 13 + 7;
        if (at && at + size > wide - 24) { at = 0; line += 1; }
        places.set(group.id, {x: x + 12 + at, y: y + 32 + line * 22, width: size - 4, height: 17, group});
        at += size;
      } else {
        places.set(group.id, {x: x + 12, y: y + 32 + line * 38, width: wide - 24, height: 32, group});
        line += 1;
      }
    }
    const lines = isCompact ? line + (groups.length ? 1 : 0) : line;
    const height = 38 + lines * (isCompact ? 22 : 38) + (lines ? 0 : 14);
    nodes.push({id, x, y, width: wide, height, isEmpty: !groups.length});
    heights[column] += height + 16;
  }
  return {isCompact, nodes, places, height: Math.max(...heights)};
}

function drawGroup(svg, {x, y, width, height, group}, rate, isCompact) {
  const state = GROUP_STATES[group.state] || "idle", box = make("g", {"data-group": group.id}, "", svg);
  const ranks = group.ranks.map((rank) => `rank ${rank.rank}: ${rank.state}, ${rank.device || "?"} on ${rank.node}`).join("\n");
  make("title", {}, `${group.id}\n${group.state}, epoch ${group.epoch}${group.reason ? `\n${group.reason}` : ""}\n${ranks}`, box);
  make("rect", {class: `group ${state}`, x, y, width, height, rx: isCompact ? 5 : 8}, "", box);
  const shown = group.ranks.length ? group.ranks : [{state: group.state}];
  const most = isCompact ? shown.length : Math.min(shown.length, 16), side = isCompact ? 10 : 12;
  shown.slice(0, most).forEach((rank, at) => make("rect", {
    class: `rank ${GROUP_STATES[rank.state] || "idle"}`, width: side, height: side, rx: 3,
    x: isCompact ? x + 3.5 + at * 13 : x + width - 10 - (most - at) * 15 + 3, y: y + (height - side) / 2,
  }, "", box));
  if (isCompact) return;
  const words = group.state === "ready" ? (rate ? `${count(rate)}/s` : "") : group.state.replace("_", " ");
  const room = width - 30 - most * 15 - words.length * 6.5;
  make("text", {x: x + 12, y: y + 20.5}, cut(group.model, Math.max(6, Math.floor(room / 7))), box);
  make("text", {class: "small", x: x + width - 16 - most * 15, y: y + 20.5, "text-anchor": "end"}, words, box);
}

function showMap(now, change) {
  const svg = byId("map"), width = svg.parentElement.clientWidth - 36;
  const isNarrow = width < 700, side = isNarrow ? 96 : 184;
  // Few nodes stand in one column, so that no line passes behind one on its way to another.
  const isFew = now.members.filter((one) => one.kind === "node").length <= 4 && now.groups.length <= 20;
  const gap = isNarrow ? 26 : isFew ? Math.max(84, (width - 2 * side - NODE_COLUMN) / 2) : 84;
  const gateways = now.members.filter((one) => one.kind === "gateway"), orchestrators = now.members.filter((one) => one.kind === "orchestrator");
  const left = 2 * (side + gap), plan = placed(now, left, width - left - 1);
  const tallest = Math.max(gateways.length, orchestrators.length) * 60 + 26, height = Math.max(plan.height, tallest, 110);
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  // Beside a map that is higher than a screen they stay where they are seen first.
  const heightOf = (list) => (Math.min(height, 640) + 26 - list.length * 60 + 14) / 2;
  const spots = (list, x) => new Map(list.map((one, at) => [one.id, {x, y: Math.max(26, heightOf(list)) + at * 60}]));
  const from = spots(gateways, 1), via = spots(orchestrators, side + gap);
  const rate = (kind, id) => change ? change[kind].get(id) || 0 : 0;
  const known = new Map(now.orchestrators.map((one) => [one.id, one]));
  const line = (d, used, isBroken = false) => {
    const path = make("path", {class: `line${used ? " used" : ""}${isBroken ? " broken" : ""}`, d}, "", svg);
    if (used) path.style.strokeWidth = `${Math.min(7, 1.4 + Math.log10(1 + used) * 1.5).toFixed(2)}px`;
  };
  for (const [id, spot] of from) for (const [to, target] of via) {
    const isSelf = id === now.gateway.id, link = known.get(to);
    line(curve(spot.x + side, spot.y + 23, target.x, target.y + 23), isSelf ? rate("orchestrators", to) : 0, isSelf && link && !link.is_connected);
  }
  const models = new Map(now.models.map((model) => [model.name, model]));
  const share = (name, id) => {
    const parts = (models.get(name) || {orchestrators: {}}).orchestrators, total = sum(Object.values(parts));
    return total ? (parts[id] || 0) / total : 1 / Math.max(1, via.size);
  };
  const streams = (group) => {
    const model = models.get(group.model);
    return model && model.generates && change ? (last_of(history.get(group.model) || []) || {rate: 0}).rate / Math.max(1, model.num_ready) : 0;
  };
  const rateOf = (group) => group.state === "ready" ? rate("groups", group.id) || streams(group) : 0;
  for (const [id, spot] of via) {
    if (plan.isCompact || plan.places.size * via.size > FULL_GROUPS) {
      // Lines to further columns would only be seen between the boxes of the first: their nodes' rates say it.
      for (const node of plan.nodes.filter((one) => one.x === left)) {
        const used = sum(now.groups.filter((group) => group.node === node.id).map((group) => rateOf(group) * share(group.model, id)));
        line(curve(spot.x + side, spot.y + 23, node.x, node.y + 16), used);
      }
    } else {
      for (const place of plan.places.values()) {
        line(curve(spot.x + side, spot.y + 23, place.x, place.y + place.height / 2), rateOf(place.group) * share(place.group.model, id));
      }
    }
  }
  [["gateways", 1], ["orchestrators", side + gap], ["nodes", left]].forEach(([word, x]) => make("text", {class: "title", x, y: 12}, word, svg));
  for (const one of gateways) {
    const spot = from.get(one.id), isSelf = one.id === now.gateway.id;
    member(svg, one, spot.x, spot.y, side, isSelf ? "self" : "", isSelf ? "this one" : one.endpoint);
  }
  for (const one of orchestrators) {
    const spot = via.get(one.id), link = known.get(one.id), per = rate("orchestrators", one.id);
    member(svg, one, spot.x, spot.y, side, "", !link || !link.is_connected ? "not connected" : per ? `${count(per)}/s` : "idle");
  }
  for (const node of plan.nodes) {
    make("rect", {class: "node", x: node.x, y: node.y, width: node.width, height: node.height, rx: 12}, "", svg);
    make("text", {class: "small", x: node.x + 12, y: node.y + 20}, cut(node.id, Math.floor(node.width / 9)), svg);
    const per = sum(now.groups.filter((group) => group.node === node.id).map(rateOf));
    if (per) make("text", {class: "small", x: node.x + node.width - 12, y: node.y + 20, "text-anchor": "end"}, `${count(per)}/s`, svg);
    if (node.isEmpty) make("text", {class: "small", x: node.x + 12, y: node.y + 40}, "no group", svg);
  }
  for (const place of plan.places.values()) drawGroup(svg, place, rateOf(place.group), plan.isCompact);
  const ranks = sum(now.groups.map((group) => group.ranks.length));
  byId("mesh-words").textContent = `${gateways.length} gateways · ${orchestrators.length} orchestrators · ${plan.nodes.length} nodes · `
    + `${now.groups.length} groups · ${ranks} ranks`;
  drawnWidth = window.innerWidth;
}

function show(now) {
  const fresh = last && now.gateway.uptime_s - last.gateway.uptime_s < MIN_DELTA_S && now.gateway.uptime_s >= last.gateway.uptime_s;
  if (fresh) return;
  const change = difference(now, last);
  if (change) remember(change); else history.clear();
  last = now;
  lastChange = change;
  showHead(now);
  showFigures(now, change);
  showMap(now, change);
  showModels(now);
  showErrors(now);
  document.body.dataset.looks = String(Number(document.body.dataset.looks || 0) + 1);
}

async function poll() {
  try {
    const answer = await fetch("status.json", {cache: "no-store", signal: AbortSignal.timeout(10000)});
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    problem(`This gateway does not answer (${error.message}). What is shown is old; it is asked again.`);
    byId("state").textContent = "no answer";
    byId("state").className = "pill failed";
  }
  setTimeout(poll, document.hidden ? 5 * EVERY_MS : EVERY_MS);
}
window.addEventListener("resize", () => { if (last && window.innerWidth !== drawnWidth) showMap(last, lastChange); });
poll();
