// Refuses before anything is sent what the server would refuse: too large a file, too many.
(() => {
  const refuse = (event, files) => {
    const large = [...files].findIndex((file) => file.size > MAX_BYTES);
    let line = "";
    if (files.length > MAX_FILES) {
      line = `an exam has at most ${MAX_FILES} files here, these are ${files.length}`;
    } else if (large >= 0) {
      const size = Math.ceil(files[large].size / 2 ** 20);
      line = `file ${large + 1} has ${size} MiB; at most ${MAX_BYTES / 2 ** 20} are taken`;
    }
    const shown = document.getElementById("refused");
    shown.textContent = line;
    shown.className = line ? "status alert" : "";
    if (line) {
      event.preventDefault();
      event.stopImmediatePropagation();
    }
    return line !== "";
  };
  // First of all listeners: they are the document's, and see an event on its way down.
  document.addEventListener("change", (event) => {
    if (event.target.type === "file" && refuse(event, event.target.files)) event.target.value = "";
  }, true);
  document.addEventListener("drop", (event) => refuse(event, event.dataTransfer.files), true);
})();
