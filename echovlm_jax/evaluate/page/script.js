// Shows some of the cases. Without this script all of them are shown.
(() => {
  const bar = document.querySelector("[data-filter]");
  if (!bar) return;
  const cases = [...document.querySelectorAll("[data-organ]")];
  const status = bar.querySelector("output");
  const wanted = { organ: "", rank: "", wrong: "" };
  const show = () => {
    let left = 0;
    for (const one of cases) {
      const fits = Object.entries(wanted).every(([key, value]) => !value || one.dataset[key] === value);
      one.hidden = !fits;
      left += fits;
    }
    status.textContent = left === cases.length ? "" : `${left} of ${cases.length} cases`;
    for (const button of bar.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(wanted[button.dataset.key] === button.dataset.value));
  };
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    wanted[button.dataset.key] = button.dataset.value;
    show();
  });
  bar.hidden = false;
  show();
})();
