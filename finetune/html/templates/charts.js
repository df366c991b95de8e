// Values of a chart answer to the pointer, to touch and to the arrow keys. Without this script the browser shows them as tooltips.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
document.body.append(tip);
let marked = null;

function place() {
  if (!marked) return;
  const mark = marked.getBoundingClientRect();
  const left = mark.left + (mark.width - tip.offsetWidth) / 2;
  const above = mark.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above < 8 ? mark.bottom + 8 : above}px`;
}

function show(mark) {
  marked?.classList.remove("on");
  marked = mark;
  marked?.classList.add("on");
  tip.textContent = mark?.dataset.value ?? "";
  tip.classList.toggle("on", Boolean(mark));
  place();
}

function interactive(chart) {
  const marks = [...chart.querySelectorAll("title")].map((title) => {
    const mark = title.parentNode;
    mark.dataset.value = title.textContent;
    title.remove();
    return mark;
  });
  if (!marks.length) return;
  const inRows = chart.closest(".rows") !== null; // values stand one above the other, not one after the other
  const middle = (mark) => {
    const box = mark.getBBox();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const order = (a, b) => (inRows ? a[1] - b[1] || a[0] - b[0] : a[0] - b[0] || a[1] - b[1]);
  const sorted = () => marks.sort((a, b) => order(middle(a), middle(b)));
  const nearest = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
    const away = (mark) => {
      const box = mark.getBBox();
      const x = Math.max(box.x - at.x, 0, at.x - box.x - box.width);
      const y = Math.max(box.y - at.y, 0, at.y - box.y - box.height);
      return inRows ? x + 9 * y : 9 * x + y;
    };
    return marks.reduce((best, mark) => (away(mark) < away(best) ? mark : best));
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  chart.tabIndex = 0;
  chart.setAttribute("aria-label", `${chart.getAttribute("aria-label")}; the arrow keys go through ${marks.length} values`);
  chart.addEventListener("pointermove", (event) => show(nearest(event)));
  chart.addEventListener("pointerdown", (event) => show(nearest(event)));
  chart.addEventListener("pointerleave", () => show(null));
  chart.addEventListener("blur", () => show(null));
  chart.addEventListener("focus", () => chart.matches(":focus-visible") && show(sorted()[0]));
  chart.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(null);
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const at = sorted().indexOf(marked);
    show(marks[Math.max(0, Math.min(at + steps[event.key], marks.length - 1))]);
    marked.scrollIntoView({ block: "nearest", inline: "nearest" });
  });
}

document.querySelectorAll("svg").forEach(interactive);
addEventListener("scroll", place, { capture: true, passive: true });
