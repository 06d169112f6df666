/**
 * Owns the made-up tokenizer of synthetic models: a byte-level BPE of any vocabulary size.
 *
 * Invariants
 * 1. The vocabulary is full: ids 0..vocabSize - 1, the last two being `<|begin|>` and `<|end|>`.
 * 2. Every text can be encoded (256 byte tokens); lower-case English is cut into pieces of two to four letters.
 */

const LETTERS = [...'etaoinshrdlcumwfgypbvkjxqz'];
const SPACE = '\u0120';

export const SYNTHETIC_SPECIAL_TOKENS = { bos: '<|begin|>', eos: '<|end|>' } as const;

/** tokenizer.json. `vocabSize` is from 258 to 474,000 or so. */
export function syntheticTokenizer(vocabSize: number): Record<string, unknown> {
  const vocab: Record<string, number> = {};
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
    vocab[String.fromCharCode(printable ? byte : next++)] = byte;
  }
  const merges: string[] = [];
  for (const [left, right] of mergedPairs()) {
    if (256 + merges.length === vocabSize - 2) break;
    vocab[left + right] = 256 + merges.length;
    merges.push(`${left} ${right}`);
  }
  const special = [SYNTHETIC_SPECIAL_TOKENS.bos, SYNTHETIC_SPECIAL_TOKENS.eos];
  if (256 + merges.length + special.length !== vocabSize) throw new RangeError(`no vocabulary of ${vocabSize} tokens`);
  return {
    version: '1.0',
    added_tokens: special.map((content, i) => ({
      id: vocabSize - special.length + i,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges },
  };
}

/** Two letters (or a space and a letter); then four, out of two of those. */
function* mergedPairs(): Generator<readonly [string, string]> {
  const inner = LETTERS.flatMap((a) => LETTERS.map((b) => [a, b] as const));
  const initial = LETTERS.map((letter) => [SPACE, letter] as const);
  yield* initial;
  yield* inner;
  for (const right of inner) {
    for (const left of [...initial, ...inner]) yield [left.join(''), right.join('')];
  }
}
