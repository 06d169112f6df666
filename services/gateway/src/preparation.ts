/**
 * Owns the way from a well-formed request to a work item: chat template, tokenizer, limits of model and cluster.
 *
 * Invariants
 * 1. Length problems are the client's, whether or not the cluster is up: they are told first.
 */
import { randomBytes } from 'node:crypto';
import type { GenerateRequest, WireEncoding, WorkItem } from '@lamina/protocol';
import { admit, promptOf, type ServedModel } from './admission.ts';
import { DEFAULT_CLIENT } from './client-id.ts';
import { type ClusterView, requireAvailable } from './cluster-view.ts';
import type { PromptTokenizer } from './prompt-tokenizer.ts';

export interface PreparationParts {
  readonly model: ServedModel;
  readonly promptTokenizer: Pick<PromptTokenizer, 'encode'>;
  readonly cluster: Pick<ClusterView, 'recent'>;
}

export interface Origin {
  readonly id: string;
  readonly encoding: WireEncoding;
  readonly client: string;
  /** When the request came, Unix time in ms: its deadline counts from here. */
  readonly receivedAtMs: number;
  /** A part of its answer is stored already. */
  readonly isContinued: boolean;
  /** Gives up the place before the tokenizer. */
  readonly signal?: AbortSignal;
  /** Told how many tokens the prompt has, before that is compared with what there is. */
  readonly onCounted?: (promptTokens: number) => void;
}

/** @throws LaminaError `invalid_request`, `unknown_model`, `context_length_exceeded`, `kv_capacity_exceeded`, `overloaded`, `unavailable` */
export async function prepare(parts: PreparationParts, request: GenerateRequest, origin: Origin): Promise<WorkItem> {
  const { model, promptTokenizer, cluster } = parts;
  const { id, encoding, client, receivedAtMs, isContinued, signal, onCounted } = origin;
  const prompt = promptOf(request, model);
  const deadlineAtMs = request.deadline_ms === undefined ? undefined : receivedAtMs + request.deadline_ms;
  const tokenIds =
    'tokenIds' in prompt ? prompt.tokenIds : await promptTokenizer.encode(prompt, { signal, deadlineAtMs });
  onCounted?.(tokenIds.length);
  const facts = { id, encoding, nowMs: receivedAtMs, randomSeed: randomBytes(6).readUIntBE(0, 6) };
  admit(request, tokenIds, model, { ...facts, kvCapacityTokens: Number.POSITIVE_INFINITY });
  const { kvCapacityTokens } = requireAvailable(await cluster.recent());
  const admitted = admit(request, tokenIds, model, { ...facts, kvCapacityTokens });
  const item = client === DEFAULT_CLIENT ? admitted : { ...admitted, client };
  return isContinued ? { ...item, isContinued } : item;
}
