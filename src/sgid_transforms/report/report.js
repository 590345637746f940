(() => {
  "use strict";
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // Orders two values that came out of attributes. What was not measured is "", and comes last in either direction.
  const compare = (a, b, numeric, sign) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numeric ? Number(a) - Number(b) : collator.compare(a, b));
  };

  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    const body = table.tBodies[0];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const numeric = head.dataset.kind === "number";
      const ascending = head.ariaSort === "ascending" ? false : head.ariaSort === "descending" ? true : head.dataset.first !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      body.append(...Array.from(body.rows).sort((a, b) => compare(value(a), value(b), numeric, ascending ? 1 : -1)));
    }));
  }

  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const cards = all(".card", gallery);
  const words = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const [search, label, state, order, count, none] = ["search", "label", "state", "order", "count", "none"].map((id) => document.getElementById(id));

  const filter = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of cards) {
      const fits = (!label.value || card.dataset.label === label.value) &&
        (!state.value || card.dataset.state.split(" ").includes(state.value)) &&
        wanted.every((word) => words.get(card).includes(word));
      card.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${cards.length}`;
    none.hidden = shown > 0;
  };

  const sort = () => {
    const [name, direction, kind] = order.value.split(" ");
    gallery.append(...cards.slice().sort((a, b) => compare(a.dataset[name], b.dataset[name], kind !== "text", direction === "down" ? -1 : 1)));
  };

  // A card that the filter hides could not be jumped to.
  const reveal = () => {
    const card = location.hash && document.getElementById(location.hash.slice(1));
    if (!card || !card.hidden) return;
    search.value = label.value = state.value = "";
    filter();
    card.scrollIntoView();
  };

  search.addEventListener("input", filter);
  label.addEventListener("change", filter);
  state.addEventListener("change", filter);
  order.addEventListener("change", sort);
  window.addEventListener("hashchange", reveal);
  for (const button of all("button[data-label]")) {
    button.addEventListener("click", () => {
      label.value = button.dataset.label;
      filter();
      gallery.parentElement.scrollIntoView();
    });
  }
  // A click on a picture shows it large, beside its original.
  const zoom = document.getElementById("zoom");
  gallery.addEventListener("click", (event) => {
    const figure = event.target.closest("button.frame")?.closest("figure");
    if (!figure) return;
    const original = figure.parentElement.firstElementChild;
    const shown = figure === original ? [figure] : [original, figure];
    zoom.lastElementChild.replaceChildren(...shown.map((each) => each.cloneNode(true)));
    for (const button of all("button.frame", zoom)) button.disabled = true;
    zoom.showModal();
  });
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close(); // beside the dialog
  });

  sort(); // browsers restore form fields when a page is reloaded
  filter();
})();
