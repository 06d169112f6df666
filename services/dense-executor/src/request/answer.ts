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
import { type StopMatch, StopMatcher } from './stop-matcher.ts';

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
    const { item, tokenizer } = this.#options;
    const index = this.#numTokens;
    const { match, finishReason } = this.#take(sampled.token);
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

  /** Takes up a token whose message is stored. Returns why the answer ends with it, if it does by what is asked for now. */
  resume(token: number): FinishReason | null {
    return this.#take(token).finishReason;
  }

  #take(token: number): { match: StopMatch; finishReason: FinishReason | null } {
    const { item, eosTokenIds } = this.#options;
    this.#numTokens++;
    const isEos = eosTokenIds.has(token) && !item.ignoreEos;
    const match = this.#stops.push(isEos ? '' : this.#detokenizer.push(token));
    const isFull = this.#numTokens >= item.maxTokens;
    return { match, finishReason: match.isStopped || isEos ? 'stop' : isFull ? 'length' : null };
  }

  /** The last message of an answer that ends without a token: behind a stored part, that may be for any reason. */
  end(finishReason: FinishReason, error?: ErrorBody): TokenMessage {
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
