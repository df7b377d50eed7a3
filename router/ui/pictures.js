// The pictures that go with the next message, and the ways they come in.

/** Shows what is attached in `list` and calls `onChange` when that changes. */
export class Attachments {
  #list;
  #onChange;
  #pictures = [];

  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
  }

  /** [{name, uri}]: the files' names and data URIs. */
  get pictures() {
    return [...this.#pictures];
  }

  set pictures(pictures) {
    this.#pictures = [...pictures];
    this.#show();
  }

  /** Add files in their order, once they are read. Throws what reading throws. */
  async add(files) {
    const read = await Promise.all([...files].map(readPicture));
    this.pictures = [...this.#pictures, ...read];
  }

  #show() {
    this.#list.replaceChildren(...this.#pictures.map((picture) => this.#item(picture)));
    this.#onChange();
  }

  #item(picture) {
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${picture.name}`);
    remove.addEventListener("click", () => {
      this.pictures = this.#pictures.filter((other) => other !== picture);
    });
    const item = document.createElement("li");
    item.append(image(picture), remove);
    return item;
  }
}

/** An <img> of {name, uri}. */
export function image({ name, uri }) {
  const element = document.createElement("img");
  element.src = uri;
  element.alt = name;
  element.title = name;
  return element;
}

/** Take pictures that are dropped on the page; `overlay` is shown while they hover over it. */
export function takeDrops(overlay, take) {
  let depth = 0; // elements entered and not yet left
  const isFiles = (event) => event.dataTransfer.types.includes("Files");
  const on = (name, act) =>
    document.addEventListener(name, (event) => {
      if (!isFiles(event)) return;
      event.preventDefault(); // or the browser opens the file
      act(event);
      overlay.hidden = depth === 0;
    });
  on("dragenter", () => (depth += 1));
  on("dragleave", () => (depth = Math.max(0, depth - 1)));
  on("dragover", () => {});
  on("drop", (event) => {
    depth = 0;
    take(event.dataTransfer.files);
  });
}

/** Take pictures that are pasted; text is left to the field it goes to. */
export function takePastes(take) {
  document.addEventListener("paste", (event) => {
    const { files } = event.clipboardData;
    if (files.length === 0) return;
    event.preventDefault();
    take(files);
  });
}

function readPicture(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ name: file.name, uri: reader.result });
    reader.onerror = () => reject(new Error(`${file.name} could not be read.`));
    reader.readAsDataURL(file);
  });
}
