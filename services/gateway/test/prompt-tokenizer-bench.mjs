/**
 * Measures what decides where a prompt is tokenized: inline against a worker thread, and the chat template per message.
 * Run: `npx tsc -b && node services/gateway/test/prompt-tokenizer-bench.mjs [model directory]`
 */
import { fileURLToPath } from 'node:url';
import { loadTokenizer, tokenizerDigest } from '@lamina/model';
import { createChat } from '../dist/chat.js';
import { createPromptEncoder } from '../dist/prompt-encoder.js';
import { PromptThread } from '../dist/prompt-thread.js';

const modelDir = process.argv[2] ?? fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));
const STORY = 'Once upon a time, there was a little girl named Lily. She had 3 dogs and 17 cats! ';
const CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}";

const tokenizer = await loadTokenizer(modelDir);
const bounds = { contextLength: 8 * 1024 * 1024, maxTokenBytes: 64 };
const chat = { modelId: 'bench', chatTemplate: CHATML, specialTokens: {} };
const renderChat = createChat(chat);
const encode = createPromptEncoder(bounds, renderChat, tokenizer);
const worker = { modelDir, digest: await tokenizerDigest(modelDir), bounds, chat };
const thread = new PromptThread({ worker, maxWaiting: 8 });
const textOf = (characters) => ({ text: STORY.repeat(Math.ceil(characters / STORY.length)).slice(0, characters) });

async function medianMs(run) {
  const times = [];
  for (let i = 0; i < 60; i++) {
    const startedAt = performance.now();
    await run();
    times.push(performance.now() - startedAt);
  }
  return times.sort((a, b) => a - b)[30].toFixed(3);
}

for (const characters of [64, 512, 1_024, 2_048, 4_096, 16_384, 65_536]) {
  const prompt = textOf(characters);
  const inlineMs = await medianMs(() => encode(prompt));
  const threadMs = await medianMs(() => thread.encode(prompt, characters, {}));
  console.log(JSON.stringify({ characters, inlineMs, threadMs }));
}
const messages = Array.from({ length: 256 }, () => ({ role: 'user', content: 'hi' }));
console.log(JSON.stringify({ templateUsPerMessage: ((await medianMs(() => renderChat(messages))) * 1000) / 256 }));
const letters = STORY.replace(/[^a-z]/g, '');
for (const [kind, text] of Object.entries({ words: STORY, letters, digits: '7', spaces: ' ', cjk: '漢字' })) {
  const prompt = { text: text.repeat(Math.ceil(4_194_304 / Buffer.byteLength(text))) };
  const rssBefore = process.memoryUsage().rss;
  const startedAt = performance.now();
  const outcome = await thread.encode(prompt, prompt.text.length, {}).catch((error) => error);
  const ms = Math.round(performance.now() - startedAt);
  const grownMiB = Math.round((process.memoryUsage().rss - rssBefore) / 2 ** 20);
  console.log(JSON.stringify({ kind, bytes: 4_194_304, ms, grownMiB, outcome: outcome.message ?? outcome.length }));
}
await thread.close();
