/**
 * Owns turning tokens into an answer: detokenization, stop conditions, the token messages.
 *
 * Invariants
 * 1. The texts of all messages joined are the text of all tokens (special ones left out), cut before a stop string.
 * 2. Exactly one message has a finish_reason, the last one; it has the usage.
 */
import { IncrementalDetokenizer, type Tokenizer } from '@lamina/model';
import type { ErrorBody, FinishReason, TokenMessage, WorkItem } from '@lamina/protocol';
import type { SampledToken } from './sampler.ts';
import { StopMatcher } from './stop-matcher.ts';

export interface AnswerOptions {
  readonly tokenizer: Tokenizer;
  readonly eosTokenIds: ReadonlySet<number>;
  readonly item: Pick<WorkItem, 'id' | 'tokenIds' | 'maxTokens' | 'stop' | 'logprobs' | 'ignoreEos'>;
}

const utf8 = new TextDecoder();

export class Answer {
  readonly #options: AnswerOptions;
  readonly #detokenizer: IncrementalDetokenizer;
  readonly #stops: StopMatcher;
  #numTokens = 0;

  constructor(options: AnswerOptions) {
    this.#options = options;
    this.#detokenizer = new IncrementalDetokenizer(options.tokenizer);
    this.#stops = new StopMatcher(options.item.stop);
  }

  /** Tokens generated so far. */
  get numTokens(): number {
    return this.#numTokens;
  }

  /** The message of the next token; its finish_reason says whether it is the last one. */
  push(sampled: SampledToken): TokenMessage {
    const { item, eosTokenIds, tokenizer } = this.#options;
    const index = this.#numTokens++;
    const isEos = eosTokenIds.has(sampled.token) && !item.ignoreEos;
    const match = this.#stops.push(isEos ? '' : this.#detokenizer.push(sampled.token));
    const finishReason: FinishReason | null =
      match.isStopped || isEos ? 'stop' : this.#numTokens >= item.maxTokens ? 'length' : null;
    let { text } = match;
    let reason = finishReason;
    if (reason !== null && !match.isStopped) {
      const rest = this.#stops.push(this.#detokenizer.finish());
      text += rest.text;
      if (rest.isStopped) reason = 'stop';
      else text += this.#stops.finish();
    }
    const message: TokenMessage = { id: item.id, index, token: sampled.token, text, finish_reason: reason };
    if (item.logprobs !== null) message.logprob = sampled.logprob;
    if (item.logprobs !== null && item.logprobs > 0) {
      message.top_logprobs = sampled.topLogprobs.map(({ token, logprob }) => ({
        token,
        text: utf8.decode(tokenizer.tokenBytes(token)),
        logprob,
      }));
    }
    if (reason !== null) message.usage = this.#usage();
    return message;
  }

  /** The last message of an answer that ends without a token. */
  end(finishReason: 'cancelled' | 'error', error?: ErrorBody): TokenMessage {
    const rest = this.#stops.push(this.#detokenizer.finish());
    const text = rest.isStopped ? rest.text : rest.text + this.#stops.finish();
    const message: TokenMessage = {
      id: this.#options.item.id,
      index: this.#numTokens,
      token: null,
      text,
      finish_reason: finishReason,
      usage: this.#usage(),
    };
    if (error !== undefined) message.error = error;
    return message;
  }

  #usage(): NonNullable<TokenMessage['usage']> {
    const promptTokens = this.#options.item.tokenIds.length;
    return {
      prompt_tokens: promptTokens,
      completion_tokens: this.#numTokens,
      total_tokens: promptTokens + this.#numTokens,
    };
  }
}
