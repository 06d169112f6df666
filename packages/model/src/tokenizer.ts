/**
 * Owns the tokenizer of a model: text to token ids, and one token id to its bytes.
 *
 * Invariants
 * 1. A token's bytes do not depend on its neighbours: the bytes of a sequence are the bytes of its tokens, joined.
 *    (Only the single space that SentencePiece puts before a text does; `stripLeadingSpace` tells the detokenizer.)
 * 2. Special tokens and ids that no token has are no bytes.
 * 3. `encode` takes time in proportion to the text (times log n for a run without a boundary), whatever the text is.
 */
import { Tokenizer as HuggingFaceTokenizer } from '@huggingface/tokenizers';
import { LaminaError } from '@lamina/tensor';
import { modelInvalid, reasonOf } from './model-error.ts';
import { PieceCache } from './piece-cache.ts';
import { type ByteRules, readTokenizerSettings, type TokenizerSettings } from './tokenizer-files.ts';

export interface EncodeOptions {
  /**
   * Whether the tokens that the tokenizer puts around a text (BOS) are added; default true. False for the output of a
   * chat template, which holds them already.
   */
  readonly addSpecialTokens?: boolean;
}

export interface Tokenizer {
  /** Highest token id + 1, added tokens included. A model's logits may be wider (padding). */
  readonly vocabSize: number;
  /** True if decoding drops one space at the start of the whole text. */
  readonly stripLeadingSpace: boolean;
  /** Token ids of a text. Throws invalid_request for text that cannot be tokenized. */
  encode(text: string, options?: EncodeOptions): number[];
  /** Bytes of one token; empty for special tokens and unknown ids. The caller must not change them. */
  tokenBytes(tokenId: number): Uint8Array;
  isSpecial(tokenId: number): boolean;
}

/** Loads tokenizer.json and tokenizer_config.json of a model. Throws model_invalid if they cannot be used. */
export async function loadTokenizer(dir: string): Promise<Tokenizer> {
  const settings = await readTokenizerSettings(dir);
  let inner: InnerTokenizer;
  try {
    inner = new HuggingFaceTokenizer(settings.tokenizerJson, settings.configJson);
  } catch (error) {
    const remedy = 'use a model whose tokenizer.json is a byte-level or SentencePiece BPE';
    throw modelInvalid(`${dir}/tokenizer.json`, `cannot be used (${reasonOf(error)})`, remedy, error);
  }
  return new ModelTokenizer(inner, settings);
}

/** What is used of the library's class (its own type declarations do not resolve under `nodenext`). */
interface InnerTokenizer {
  /** `cache` of a BPE: its tokens by pre-token. */
  readonly model: { cache?: PieceCache };
  encode(text: string, options: { add_special_tokens: boolean }): { ids: (number | undefined)[] };
  token_to_id(token: string): number | undefined;
  get_vocab(): Map<string | undefined, number>;
  get_added_tokens_decoder(): Map<number, { special: boolean }>;
}

/** Unicode's normalization is quadratic in such a run, in native code that cannot be interrupted. Honest text has up to 30. */
const MAX_COMBINING_MARKS = 1_024;
const NO_BYTES = new Uint8Array(0);
const encoder = new TextEncoder();

class ModelTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly stripLeadingSpace: boolean;
  readonly #inner: InnerTokenizer;
  readonly #settings: TokenizerSettings;
  /** Prepended by us when `add_bos_token` overrules the post-processor. */
  readonly #bosTokenId: number | null;
  readonly #specialIds = new Set<number>();
  readonly #bytes: readonly Uint8Array[];

  constructor(inner: InnerTokenizer, settings: TokenizerSettings) {
    this.#inner = inner;
    if (inner.model.cache !== undefined) inner.model.cache = new PieceCache();
    this.#settings = settings;
    this.stripLeadingSpace = settings.byteRules.stripLeadingSpace;
    this.#bosTokenId = settings.bosToken === null ? null : (inner.token_to_id(settings.bosToken) ?? null);
    const added = inner.get_added_tokens_decoder();
    for (const [id, token] of added) if (token.special) this.#specialIds.add(id);
    for (const token of settings.additionalSpecialTokens) {
      const id = inner.token_to_id(token);
      if (id !== undefined) this.#specialIds.add(id);
    }
    const bytes: Uint8Array[] = [];
    for (const [token, id] of inner.get_vocab()) {
      if (token === undefined) continue;
      const isAdded = added.has(id);
      bytes[id] = this.#specialIds.has(id) ? NO_BYTES : bytesOf(token, settings.byteRules, isAdded);
    }
    this.#bytes = bytes;
    this.vocabSize = bytes.length;
  }

  encode(text: string, options: EncodeOptions = {}): number[] {
    if (/\p{Surrogate}/u.test(text)) {
      throw new LaminaError('invalid_request', 'the text has an unpaired UTF-16 surrogate; send well-formed Unicode');
    }
    for (const [run] of text.matchAll(/\p{M}+/gu)) {
      if (run.length <= MAX_COMBINING_MARKS) continue;
      const problem = `the text has more than ${MAX_COMBINING_MARKS} combining marks in a row`;
      throw new LaminaError('invalid_request', `${problem}; send fewer`);
    }
    const addSpecialTokens = options.addSpecialTokens ?? true;
    const explicit = this.#settings.addBosTokenIsExplicit;
    const ids = this.#encodeInner(text, addSpecialTokens && !explicit);
    const tokenIds: number[] = [];
    if (addSpecialTokens && explicit && this.#settings.addBosToken && this.#bosTokenId !== null) {
      tokenIds.push(this.#bosTokenId);
    }
    for (const id of ids) {
      if (id === undefined) {
        throw new LaminaError('invalid_request', 'the text has characters that the model has no tokens for');
      }
      tokenIds.push(id);
    }
    return tokenIds;
  }

  #encodeInner(text: string, addSpecialTokens: boolean): readonly (number | undefined)[] {
    try {
      return this.#inner.encode(text, { add_special_tokens: addSpecialTokens }).ids;
    } catch (cause) {
      // The library passes the tokens of one pre-token as arguments, and regular expressions have a stack.
      if (!(cause instanceof RangeError)) throw cause;
      const problem = 'the text has a part without a boundary that is too long for the tokenizer of this model';
      throw new LaminaError('invalid_request', `${problem}; shorten it`, { cause });
    }
  }

  tokenBytes(tokenId: number): Uint8Array {
    return this.#bytes[tokenId] ?? NO_BYTES;
  }

  isSpecial(tokenId: number): boolean {
    return this.#specialIds.has(tokenId);
  }
}

function bytesOf(token: string, rules: ByteRules, isAdded: boolean): Uint8Array {
  if (rules.alphabet === 'byte_level') {
    const bytes = isAdded ? null : byteLevelBytes(token);
    return bytes ?? encoder.encode(token);
  }
  const byte = rules.byteFallback ? /^<0x([0-9A-Fa-f]{2})>$/.exec(token)?.[1] : undefined;
  if (byte !== undefined) return Uint8Array.of(Number.parseInt(byte, 16));
  let text = token;
  for (const [from, to] of rules.replacements) text = text.replaceAll(from, to);
  return encoder.encode(text);
}

/** Bytes of a token in GPT-2's alphabet, or null if a character is not of it. */
function byteLevelBytes(token: string): Uint8Array | null {
  const bytes: number[] = [];
  for (const character of token) {
    const byte = BYTE_LEVEL_ALPHABET.get(character);
    if (byte === undefined) return null;
    bytes.push(byte);
  }
  return Uint8Array.from(bytes);
}

/**
 * GPT-2's alphabet: the printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards in
 * ascending order.
 */
const BYTE_LEVEL_ALPHABET: ReadonlyMap<string, number> = (() => {
  const alphabet = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    alphabet.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return alphabet;
})();
