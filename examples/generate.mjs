// Draws one picture with Node's own fetch (Node 18 or newer).
import { writeFile } from 'node:fs/promises';

const address = process.env.HELIOGRAPH_URL ?? 'http://127.0.0.1:8000';
const answer = await fetch(`${address}/v1/generate`, {
  method: 'POST',
  headers: { 'Content-Type': 'application/json' },
  body: JSON.stringify({ prompt: 'a white ring on a green background', seed: 7 }),
});
if (!answer.ok) throw new Error(await answer.text());

const { images, parameters } = await answer.json();
await writeFile('ring.png', Buffer.from(images[0].base64, 'base64'));
console.log('ring.png', parameters);
