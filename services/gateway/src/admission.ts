/**
 * Owns the checks between a well-formed request and a work item: model, prompt, length, sampling defaults.
 *
 * Invariants
 * 1. Pure: no clock, no randomness, no connection; what varies comes in as arguments.
 * 2. A default max_tokens is cut to what fits; a given max_tokens that does not fit is refused with the largest that does.
 * 3. Sampling comes from the request, else the model's generation_config.json, else OpenAI's defaults.
 */
import { type GenerateRequest, LIMITS, type Sampling, type WireEncoding, type WorkItem } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import { type PromptBounds, type PromptText, requireBytesFit, requireTokensFit } from './prompt-encoder.ts';

export interface ServedModel extends PromptBounds {
  readonly modelId: string;
  readonly vocabSize: number;
  readonly generationDefaults: {
    readonly temperature: number | null;
    readonly topP: number | null;
    readonly topK: number | null;
    readonly minP: number | null;
    readonly maxNewTokens: number | null;
  };
}

/** What the model is to continue: token ids, or text that has to be tokenized first. */
export type Prompt = { readonly tokenIds: readonly number[] } | PromptText;

/** A generation_config.json may say 0, which means the same as a very small one: the likeliest token only. */
const MIN_TOP_P = 1e-6;

/** @throws LaminaError `unknown_model`, `invalid_request`, `context_length_exceeded` */
export function promptOf(request: GenerateRequest, model: ServedModel): Prompt {
  if (request.model !== undefined && request.model !== model.modelId) {
    throw new LaminaError('unknown_model', `the model "${request.model}" is not served here; "${model.modelId}" is`);
  }
  if (request.token_ids !== undefined) {
    const bad = request.token_ids.findIndex((token) => token >= model.vocabSize);
    if (bad >= 0) {
      const problem = `token_ids.${bad}: ${request.token_ids[bad]} is no token of "${model.modelId}"`;
      throw new LaminaError('invalid_request', `${problem}; its tokens are 0 to ${model.vocabSize - 1}`);
    }
    return { tokenIds: request.token_ids };
  }
  if (request.messages !== undefined) return { messages: request.messages };
  const text = request.prompt ?? '';
  requireBytesFit(text, model);
  return { text };
}

export interface AdmissionFacts {
  readonly id: string;
  readonly encoding: WireEncoding;
  readonly nowMs: number;
  /** Used where the request has no seed. */
  readonly randomSeed: number;
  /** Tokens of one request for which the KV cache of the whole cluster has room; Infinity where windows bound it. */
  readonly kvCapacityTokens: number;
}

/** @throws LaminaError `invalid_request`, `context_length_exceeded`, `kv_capacity_exceeded` */
export function admit(
  request: GenerateRequest,
  tokenIds: readonly number[],
  model: ServedModel,
  facts: AdmissionFacts,
): WorkItem {
  if (tokenIds.length === 0) throw new LaminaError('invalid_request', 'the prompt has no tokens');
  // A tokenizer may declare special tokens (for images, say) that the model has no embedding for.
  const unknown = tokenIds.find((token) => token >= model.vocabSize);
  if (unknown !== undefined) {
    throw new LaminaError('invalid_request', `the prompt has token ${unknown}, which "${model.modelId}" cannot read`);
  }
  return {
    id: facts.id,
    model: model.modelId,
    tokenIds: [...tokenIds],
    maxTokens: maxTokensOf(request.max_tokens, tokenIds.length, model, facts.kvCapacityTokens),
    sampling: samplingOf(request, model, facts.randomSeed),
    stop: request.stop ?? [],
    logprobs: logprobsOf(request.logprobs),
    ignoreEos: request.ignore_eos ?? false,
    priority: request.priority ?? 0,
    deadlineAtMs: request.deadline_ms === undefined ? null : facts.nowMs + request.deadline_ms,
    encoding: facts.encoding,
    submittedAtMs: facts.nowMs,
  };
}

function maxTokensOf(
  given: number | undefined,
  promptTokens: number,
  model: ServedModel,
  kvCapacityTokens: number,
): number {
  const { contextLength } = model;
  const restOfContext = contextLength - promptTokens;
  requireTokensFit(promptTokens, model);
  if (given !== undefined && given > restOfContext) {
    throw new LaminaError(
      'context_length_exceeded',
      `the prompt has ${promptTokens} tokens and max_tokens is ${given}; the context is ${contextLength}, so max_tokens can be at most ${restOfContext}`,
    );
  }
  const restOfKv = kvCapacityTokens - promptTokens;
  if (restOfKv < (given ?? 1)) {
    const answer = given === undefined ? '' : ` and max_tokens is ${given}`;
    throw new LaminaError(
      'kv_capacity_exceeded',
      `the prompt has ${promptTokens} tokens${answer}; all attention shards together hold ${kvCapacityTokens}; start more shards or shorten it`,
    );
  }
  return given ?? Math.min(model.generationDefaults.maxNewTokens ?? LIMITS.maxTokens, restOfContext, restOfKv);
}

function samplingOf(request: GenerateRequest, model: ServedModel, randomSeed: number): Sampling {
  const defaults = model.generationDefaults;
  return {
    temperature: request.temperature ?? defaults.temperature ?? 1,
    topP: request.top_p ?? Math.max(defaults.topP ?? 1, MIN_TOP_P),
    topK: request.top_k ?? defaults.topK ?? 0,
    minP: request.min_p ?? defaults.minP ?? 0,
    seed: request.seed ?? randomSeed,
  };
}

function logprobsOf(given: GenerateRequest['logprobs']): number | null {
  if (given === undefined || given === false) return null;
  return given === true ? 0 : given;
}
