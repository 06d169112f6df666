/** Requests as the scheduler sees them, with block tables over given shards. */
import { fileURLToPath } from 'node:url';
import { AnswerWriter, type WorkLease } from '@lamina/bus';
import { loadTokenizer } from '@lamina/model';
import { Answer } from '../src/request/answer.ts';
import { GenerationRequest } from '../src/request/request.ts';
import { Clients } from '../src/scheduling/clients.ts';

const tokenizer = await loadTokenizer(fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url)));

export const BLOCK = 16;

/** Takes every message as stored. */
const STREAM = { isClosed: false, append: () => Promise.resolve(1) };
const clients = new Clients();
let arrivals = 0;

export function request(options: {
  numPromptTokens: number;
  numComputed?: number;
  phase?: 'prefill' | 'decode';
  shards?: string[];
  priority?: number;
  numBlocks?: number;
  maxTokens?: number;
  client?: string | undefined;
}): GenerationRequest {
  const id = `r${arrivals}`;
  const tokenIds = Array.from({ length: options.numPromptTokens }, (_, i) => i % 1000);
  const item = {
    id,
    model: 'm',
    tokenIds,
    maxTokens: options.maxTokens ?? 50,
    sampling: { temperature: 0.5, topP: 0.9, topK: 4, minP: 0.1, seed: 77 },
    stop: [],
    logprobs: 3,
    ignoreEos: false,
    priority: options.priority ?? 0,
    deadlineAtMs: null,
    encoding: 'json' as const,
    submittedAtMs: 0,
  };
  const lease: WorkLease = { item, deliveryCount: 1, renew: () => {}, complete: () => {}, release: () => {} };
  const made = new GenerationRequest(
    item,
    lease,
    new Answer({ tokenizer, eosTokenIds: new Set(), item }),
    new AnswerWriter(STREAM, 'json', 0, () => undefined),
    clients.enter(options.client),
  );
  arrivals++;
  const shards = options.shards ?? ['a'];
  const numBlocks = options.numBlocks ?? Math.ceil((options.numPromptTokens + 1) / BLOCK);
  made.blockTable = Array.from({ length: numBlocks }, (_, i) => ({
    shardId: shards[i % shards.length]!,
    block: arrivals * 1000 + i,
  }));
  made.numComputed = options.numComputed ?? 0;
  made.phase = options.phase ?? 'prefill';
  return made;
}
