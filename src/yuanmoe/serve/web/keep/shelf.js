// Conversations in this browser's IndexedDB: heads for the list, messages one by one: a long answer is saved alone.
// Without a database (private windows of some browsers) conversations last until the page is closed.

import { Conversation } from "./conversation.js";

const wait = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

// Committed by hand: a page that goes away before the browser would do it by itself loses what was asked.
const finished = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
    transaction.commit();
  });

function open() {
  const request = indexedDB.open("yuanmoe", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("heads", { keyPath: "id" });
    request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("conversation", "conversation");
  };
  return wait(request);
}

export class Shelf {
  #database;

  /** Opens the database; null where the browser has none for us. */
  static async open() {
    try {
      const shelf = new Shelf();
      shelf.#database = await open();
      return shelf;
    } catch {
      return null;
    }
  }

  /** The heads of all conversations, the latest first. */
  async heads() {
    const heads = await wait(this.#database.transaction("heads").objectStore("heads").getAll());
    return heads.sort((one, other) => other.updated - one.updated);
  }

  /** The ids of the conversations in which a text is said, in capitals or not. */
  async mentions(text) {
    const wanted = text.toLocaleLowerCase();
    const found = new Set();
    const request = this.#database.transaction("messages").objectStore("messages").openCursor();
    // One message at a time: an answer carries the experts of all its tokens.
    for (let cursor; (cursor = await wait(request)); cursor.continue()) {
      const { conversation, content } = cursor.value;
      if (content.toLocaleLowerCase().includes(wanted)) found.add(conversation);
    }
    return found;
  }

  async read(id) {
    const transaction = this.#database.transaction(["heads", "messages"]);
    const head = wait(transaction.objectStore("heads").get(id));
    const messages = wait(transaction.objectStore("messages").index("conversation").getAll(id));
    return (await head) && new Conversation(await head, await messages);
  }

  /** Saves the head and those messages. */
  write(head, messages) {
    const transaction = this.#database.transaction(["heads", "messages"], "readwrite");
    transaction.objectStore("heads").put(head);
    for (const message of messages) transaction.objectStore("messages").put(message);
    return finished(transaction);
  }

  async remove(id) {
    const transaction = this.#database.transaction(["heads", "messages"], "readwrite");
    transaction.objectStore("heads").delete(id);
    const messages = transaction.objectStore("messages");
    for (const key of await wait(messages.index("conversation").getAllKeys(id))) messages.delete(key);
    return finished(transaction);
  }
}
