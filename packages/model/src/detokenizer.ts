/**
 * Owns incremental detokenization: a stream of token ids to a stream of text.
 *
 * Invariants
 * 1. No piece ends inside a UTF-8 character; bytes of an unfinished one wait for the next token or `finish`.
 * 2. The pieces of push()... and finish() joined are the decode of the whole sequence, however it is cut.
 * 3. Invalid bytes become U+FFFD as the WHATWG decoder does; a byte order mark is kept.
 */
import type { Tokenizer } from './tokenizer.ts';

export interface DetokenizerOptions {
  /** True if the tokens go on from text before them: the leading space of SentencePiece is then kept. Default false. */
  readonly continuation?: boolean;
}

/** One request's text. Not usable after `finish`. */
export class IncrementalDetokenizer {
  readonly #tokenizer: Tokenizer;
  readonly #decoder = new TextDecoder('utf-8', { fatal: false, ignoreBOM: true });
  #stripSpace: boolean;

  constructor(tokenizer: Tokenizer, options: DetokenizerOptions = {}) {
    this.#tokenizer = tokenizer;
    this.#stripSpace = tokenizer.stripLeadingSpace && options.continuation !== true;
  }

  /** Text that this token completes; often one word, empty for special tokens and parts of characters. */
  push(tokenId: number): string {
    return this.#emit(this.#decoder.decode(this.#tokenizer.tokenBytes(tokenId), { stream: true }));
  }

  /** The rest: U+FFFD if the last character was never completed, else empty. */
  finish(): string {
    return this.#emit(this.#decoder.decode());
  }

  #emit(text: string): string {
    if (!this.#stripSpace || text.length === 0) return text;
    this.#stripSpace = false;
    return text.startsWith(' ') ? text.slice(1) : text;
  }
}
