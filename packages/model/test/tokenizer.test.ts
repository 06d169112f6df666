/** Tokenizer and incremental detokenizer: lamina-tiny (byte-level), and a small SentencePiece-style BPE. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LaminaError } from '@lamina/tensor';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { IncrementalDetokenizer } from '../src/detokenizer.ts';
import { loadTokenizer, type Tokenizer } from '../src/tokenizer.ts';

const TINY = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));

const TEXTS = [
  'Once upon a time, there was a little girl named Lily.',
  '  leading and trailing  ',
  'line\n\n\ttab 12345 !?',
  'Grüße, señor — naïve café',
  '漢字かな交じり文と한국어',
  '👩‍👩‍👧‍👦 family, 🇩🇪 flag, 𝒳 math',
  '\uFEFFbyte order mark',
  '',
];

/** BPE by definition: the merge of the lowest rank, the leftmost first, until there is none. */
function mergeNaively(text: string, merges: readonly string[]): string[] {
  const pieces = [...text];
  for (;;) {
    const ranks = pieces.map((piece, i) => merges.indexOf(`${piece} ${pieces[i + 1]}`));
    const possible = ranks.filter((rank) => rank >= 0);
    if (possible.length === 0) return pieces;
    const at = ranks.indexOf(Math.min(...possible));
    pieces.splice(at, 2, `${pieces[at]}${pieces[at + 1]}`);
  }
}

/** The decode of a whole sequence, by definition: all bytes, decoded at once. */
function decodeWhole(tokenizer: Tokenizer, tokenIds: readonly number[]): string {
  const bytes = Buffer.concat(tokenIds.map((id) => tokenizer.tokenBytes(id)));
  const text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes);
  return tokenizer.stripLeadingSpace && text.startsWith(' ') ? text.slice(1) : text;
}

function decodeIncrementally(tokenizer: Tokenizer, tokenIds: readonly number[]): string[] {
  const detokenizer = new IncrementalDetokenizer(tokenizer);
  return [...tokenIds.map((id) => detokenizer.push(id)), detokenizer.finish()];
}

function expectSameText(tokenizer: Tokenizer): void {
  // Ids past the vocabulary and special tokens are among them.
  const tokenId = fc.nat({ max: tokenizer.vocabSize + 2 });
  fc.assert(
    fc.property(fc.array(tokenId, { maxLength: 40 }), (tokenIds) => {
      expect(decodeIncrementally(tokenizer, tokenIds).join('')).toBe(decodeWhole(tokenizer, tokenIds));
    }),
    { numRuns: 500 },
  );
}

function expectConstantCost(tokenizer: Tokenizer): void {
  const tokenIds = tokenizer.encode('Once upon a time, 漢字 👍 and an é. '.repeat(20));
  const detokenizer = new IncrementalDetokenizer(tokenizer);
  const millisecondsOf = (count: number): number => {
    const startedAt = performance.now();
    for (let i = 0; i < count; i++) detokenizer.push(tokenIds[i % tokenIds.length]!);
    return performance.now() - startedAt;
  };
  millisecondsOf(20_000);
  const early = millisecondsOf(20_000);
  millisecondsOf(300_000);
  const late = Math.min(millisecondsOf(20_000), millisecondsOf(20_000));
  // A cost that grew with the text would be ten times as high by now.
  expect(late).toBeLessThan(4 * early + 20);
}

describe('lamina-tiny', () => {
  let tokenizer: Tokenizer;
  beforeAll(async () => {
    tokenizer = await loadTokenizer(TINY);
  });

  it.each(TEXTS)('round-trips %j', (text) => {
    const tokenIds = tokenizer.encode(text);
    expect(Buffer.concat(tokenIds.map((id) => tokenizer.tokenBytes(id))).toString('utf8')).toBe(text);
    expect(decodeIncrementally(tokenizer, tokenIds).join('')).toBe(text);
  });

  it('never emits a part of a character', () => {
    const tokenIds = tokenizer.encode('a漢👍b');
    // Four bytes at least that are tokens of their own.
    expect(tokenIds.length).toBeGreaterThan(6);
    const pieces = decodeIncrementally(tokenizer, tokenIds).filter((piece) => piece !== '');
    expect(pieces.join('|')).toBe('a|漢|👍|b');
  });

  it('ends an unfinished character with U+FFFD', () => {
    const tokenIds = tokenizer.encode('é').slice(0, 1);
    expect(decodeIncrementally(tokenizer, tokenIds)).toEqual(['', '\uFFFD']);
  });

  it('gives nothing for special and unknown tokens', () => {
    expect(tokenizer.vocabSize).toBe(1024);
    expect(tokenizer.isSpecial(0)).toBe(true);
    expect(tokenizer.isSpecial(1)).toBe(false);
    expect(tokenizer.encode('<|endoftext|>')).toEqual([0]);
    for (const tokenId of [0, 1024, -1, 0.5]) expect(tokenizer.tokenBytes(tokenId)).toHaveLength(0);
  });

  it('rejects text that is not well-formed', () => {
    expect(() => tokenizer.encode('a\uD800b')).toThrow(LaminaError);
  });

  it('decodes any token sequence incrementally as at once', () => {
    expectSameText(tokenizer);
  });

  it('detokenizes at a cost that does not grow with the answer', () => {
    expectConstantCost(tokenizer);
  });

  // The library's own cache took 14 s for 256 KiB of digits.
  it.each(['7', '0123456789', 'a', ' ', '\n', '<|endoftext|', '👍'])(
    'encodes a long run of %j in linear time',
    (part) => {
      const millisecondsOf = (characters: number): number => {
        const startedAt = performance.now();
        tokenizer.encode(part.repeat(Math.ceil(characters / part.length)));
        return performance.now() - startedAt;
      };
      millisecondsOf(16_384);
      const short = Math.min(millisecondsOf(16_384), millisecondsOf(16_384));
      // Quadratic would be 256 times as long. A cost of 40 us per character would take 10 s.
      expect(millisecondsOf(262_144)).toBeLessThan(Math.max(80 * short, 1_500));
    },
  );

  it('rejects runs of combining marks, which are quadratic to normalize', () => {
    expect(tokenizer.encode(`e${'\u0301'.repeat(1_024)}`).length).toBeGreaterThan(1_000);
    expect(() => tokenizer.encode(`e${'\u0301'.repeat(1_025)}`)).toThrow(LaminaError);
  });
});

describe('a SentencePiece-style BPE with byte fallback', () => {
  let scratch = '';
  beforeAll(async () => {
    scratch = await mkdtemp(join(tmpdir(), 'lamina-tokenizer-'));
  });
  afterAll(async () => {
    await rm(scratch, { recursive: true, force: true });
  });

  async function load(
    config: Record<string, unknown>,
    decoder?: unknown,
    postProcessor?: unknown,
    merges = ['▁ h', '▁h i'],
  ): Promise<Tokenizer> {
    const pieces = ['<unk>', '<s>', '</s>'];
    for (let byte = 0; byte < 256; byte++) {
      pieces.push(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`);
    }
    pieces.push('▁', 'h', 'e', 'i', '▁h', '▁hi', '▁▁', '▁▁▁▁', 'i▁', 'i▁h');
    const special = (content: string, id: number): unknown => ({ id, content, special: true, normalized: false });
    const tokenizer = {
      version: '1.0',
      added_tokens: [special('<unk>', 0), special('<s>', 1), special('</s>', 2)],
      normalizer: {
        type: 'Sequence',
        normalizers: [
          { type: 'Prepend', prepend: '▁' },
          { type: 'Replace', pattern: { String: ' ' }, content: '▁' },
        ],
      },
      pre_tokenizer: null,
      post_processor: postProcessor ?? null,
      decoder: decoder ?? {
        type: 'Sequence',
        decoders: [
          { type: 'Replace', pattern: { String: '▁' }, content: ' ' },
          { type: 'ByteFallback' },
          { type: 'Fuse' },
          { type: 'Strip', content: ' ', start: 1, stop: 0 },
        ],
      },
      model: {
        type: 'BPE',
        unk_token: '<unk>',
        fuse_unk: true,
        byte_fallback: true,
        vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])),
        merges,
      },
    };
    await writeFile(join(scratch, 'tokenizer.json'), JSON.stringify(tokenizer));
    await writeFile(join(scratch, 'tokenizer_config.json'), JSON.stringify({ bos_token: '<s>', ...config }));
    return loadTokenizer(scratch);
  }

  const template = {
    type: 'TemplateProcessing',
    single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    pair: [],
    special_tokens: { '<s>': { id: '<s>', ids: [1], tokens: ['<s>'] } },
  };

  it('falls back to bytes and strips the leading space', async () => {
    const tokenizer = await load({});
    const tokenIds = tokenizer.encode('hi hé漢');
    expect(tokenIds.slice(0, 2)).toEqual([264, 263]);
    expect(decodeIncrementally(tokenizer, tokenIds).join('')).toBe('hi hé漢');
    const continued = new IncrementalDetokenizer(tokenizer, { continuation: true });
    expect(continued.push(264)).toBe(' hi');
  });

  it('adds the BOS token as add_bos_token says, else as the post-processor does', async () => {
    const first = async (config: Record<string, unknown>, postProcessor?: unknown): Promise<number | undefined> =>
      (await load(config, undefined, postProcessor)).encode('hi')[0];
    expect(await first({ add_bos_token: true })).toBe(1);
    expect(await first({})).toBe(264);
    expect(await first({}, template)).toBe(1);
    expect(await first({ add_bos_token: false }, template)).toBe(264);
    const tokenizer = await load({ add_bos_token: true }, undefined, template);
    expect(tokenizer.encode('hi')).toEqual([1, 264]);
    expect(tokenizer.encode('hi', { addSpecialTokens: false })).toEqual([264]);
  });

  it('cuts a text into words only where that cannot change its tokens', async () => {
    const runs = ['▁ h', '▁ ▁', '▁▁ ▁▁', '▁h i'];
    const spanning = [...runs, 'i ▁', 'i▁ h'];
    const text = fc.array(fc.constantFrom(' ', '  ', 'h', 'i', 'hi', 'e', '▁', '漢'), { maxLength: 60 });
    for (const merges of [runs, spanning]) {
      const tokenizer = await load({}, undefined, undefined, merges);
      fc.assert(
        fc.property(text, (parts) => {
          const normalized = `▁${parts.join('').replaceAll(' ', '▁')}`;
          if (parts.join('') === '') return;
          expect(
            tokenizer.encode(parts.join('')).map((id) => Buffer.from(tokenizer.tokenBytes(id)).toString('latin1')),
          ).toEqual(
            mergeNaively(normalized, merges)
              .map((piece) => Buffer.from(piece.replaceAll('▁', ' ')).toString('latin1'))
              .flatMap((piece) => (/^[ hie]+$/.test(piece) ? [piece] : [...piece])),
          );
        }),
        { numRuns: 300 },
      );
    }
  });

  it('detokenizes at a cost that does not grow with the answer', async () => {
    expectConstantCost(await load({}));
  });

  it('decodes any token sequence incrementally as at once', async () => {
    expectSameText(await load({}));
  });

  it('rejects a decoder that it does not know', async () => {
    await expect(load({}, { type: 'WordPiece', prefix: '##' })).rejects.toThrow("decoder 'WordPiece' is not supported");
  });
});
