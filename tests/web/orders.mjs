// Places orders with Node's fetch (undici): some of them streamed, and follows one answer that is streamed.
const [url, count] = [process.argv[2], Number(process.argv[3])];
const order = JSON.stringify({ user_id: 1, items: [{ name: "Pen", quantity: 1 }] });
const headers = { "content-type": "application/json" };
const streamed = () => new ReadableStream({
  start(controller) {
    for (const part of [order.slice(0, 9), order.slice(9)]) controller.enqueue(new TextEncoder().encode(part));
    controller.close();
  },
});

const statuses = {};
async function place(number) {
  const body = number % 4 ? { body: order } : { body: streamed(), duplex: "half" };
  const answer = await fetch(`${url}/orders`, { method: "POST", headers, ...body });
  await answer.json();
  statuses[answer.status] = (statuses[answer.status] ?? 0) + 1;
}
let next = 0;
await Promise.all(Array.from({ length: 16 }, async () => { while (next < count) await place(next++); }));

const stream = await fetch(`${url}/api/v1/events`, { headers: { accept: "text/event-stream" } });
const reader = stream.body.getReader();
let events = "";
while (!events.includes("order.placed")) events += new TextDecoder().decode((await reader.read()).value);
await reader.cancel();
const refused = await fetch(`${url}/orders`, { method: "POST", headers, body: "a".repeat(2_000_000) });
console.log(JSON.stringify({ statuses, refused: refused.status }));
