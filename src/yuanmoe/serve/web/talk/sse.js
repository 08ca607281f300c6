// Server-sent events from a response's body: the data of each, as it arrives.
// Source: the WHATWG HTML standard, "Server-sent events"; only the `data` field is of use here.

/** The data of every event; ends with the stream. */
export async function* events(body) {
  const reader = body.getReader();
  // Not through a TextDecoderStream: Chromium then takes every stream for one that was given up.
  const decoder = new TextDecoder();
  let line = "";
  let data = [];
  try {
    for (let part; !(part = await reader.read()).done; ) {
      const lines = (line + decoder.decode(part.value, { stream: true })).split("\n");
      line = lines.pop();
      for (const whole of lines.map((each) => each.replace(/\r$/, ""))) {
        if (whole.startsWith("data:")) data.push(whole.slice(5).replace(/^ /, ""));
        else if (whole === "" && data.length) yield data.splice(0).join("\n");
      }
    }
  } finally {
    // A reader that leaves early hangs up; one that read everything does nothing here.
    reader.cancel().catch(() => {});
  }
}
