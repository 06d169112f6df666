/** The entry of a worker thread that tokenizes prompts, one after the other. */
import { parentPort, workerData } from 'node:worker_threads';
import { loadTokenizer, tokenizerDigest } from '@lamina/model/text';
import { asLaminaError, LaminaError } from '@lamina/tensor';
import { createChat } from './chat.ts';
import { createPromptEncoder, type PromptText } from './prompt-encoder.ts';
import type { FromPromptWorker, PromptWorkerOptions } from './prompt-worker-messages.ts';

const port = parentPort;
if (port === null) throw new LaminaError('internal', 'this file is the entry of a worker thread');
const { modelDir, digest, bounds, chat }: PromptWorkerOptions = workerData;

const post = (message: FromPromptWorker, transfer: ArrayBuffer[] = []): void => port.postMessage(message, transfer);

const encode = createPromptEncoder(bounds, createChat(chat), await loadTokenizer(modelDir));
if ((await tokenizerDigest(modelDir)) !== digest) {
  throw new LaminaError('unavailable', 'the tokenizer was changed on disk while the gateway ran; restart the gateway');
}

port.on('message', (prompt: PromptText) => {
  try {
    const tokenIds = Int32Array.from(encode(prompt));
    post({ kind: 'encoded', tokenIds }, [tokenIds.buffer]);
  } catch (cause) {
    const { code, message, diagnostics } = asLaminaError(cause);
    post({ kind: 'refused', code, message, diagnostics });
  }
});
post({ kind: 'ready' });
