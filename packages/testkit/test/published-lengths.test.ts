/**
 * Published ONNX decoders that take other rotary tables for long requests (longrope): uncut against cut on both sides of
 * the length at which they switch, and while an answer grows across it. What of that kind cannot be cut is refused.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildModel, readModel } from '@lamina/model';
import {
  argmax,
  type ExportForm,
  type ExportOptions,
  StagedReference,
  UncutReference,
  writeExport,
  writeGenaiExport,
} from '@lamina/testkit';
import { afterAll, describe, expect, it } from 'vitest';

const scratch = mkdtempSync(join(tmpdir(), 'lamina-lengths-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
let numDirs = 0;
const newDir = (): string => join(scratch, `model-${numDirs++}`);

const LONG_ABOVE = 24;
const CONTEXT = 96;
const BY_LENGTH = { tokens: LONG_ABOVE, by: 'length' } as const;

interface LengthForm {
  readonly name: string;
  readonly form: ExportForm;
  readonly options: Partial<ExportOptions>;
  readonly bound: number;
}

const FORMS: readonly LengthForm[] = [
  { name: 'in the operator', form: { operator: 'gqa', longAbove: BY_LENGTH }, options: {}, bound: 1e-4 },
  {
    name: 'before the operator',
    form: { operator: 'gqa', rotary: 'before', longAbove: BY_LENGTH },
    options: {},
    bound: 1e-4,
  },
  {
    name: 'of half the head, packed, window, q4',
    form: { operator: 'gqa', packed: true, rotary: 'partial', localWindow: 20, longAbove: BY_LENGTH },
    options: { precision: 'q4', headDim: 32 },
    bound: 1e-4,
  },
  {
    name: 'in the operator, fp16',
    form: { operator: 'gqa', longAbove: BY_LENGTH },
    options: { precision: 'fp16' },
    bound: 3e-2,
  },
];

const someTokens = (length: number, seed: number): number[] =>
  Array.from({ length }, (_, i) => (i * 37 + seed * 91 + i * i * 3) % 256);

function worstOf(found: readonly Float32Array[], expected: readonly Float32Array[]): number {
  expect(found.length).toBe(expected.length);
  const differences = expected.flatMap((logits, row) => Array.from(logits, (x, i) => Math.abs(x - found[row]![i]!)));
  // NaN stays NaN.
  return differences.reduce((worst, each) => Math.max(worst, each), 0);
}

describe.each(FORMS)('tables chosen by length, rotary $name', ({ name, form, options, bound }) => {
  const dir = newDir();
  const load = async () => {
    await writeGenaiExport(dir, form, { contextLength: CONTEXT, ...options });
    const built = await buildModel(dir, { cacheDir: join(scratch, 'cache') });
    return { built, uncut: await UncutReference.load(built), staged: await StagedReference.load(built) };
  };

  it('gives the logits of the uncut graph for short and long requests in one wave', async () => {
    const { built, uncut, staged } = await load();
    expect(built.description.shortSequences).toEqual({ numTokens: LONG_ABOVE, offset: CONTEXT });
    const prompts = [7, LONG_ABOVE, LONG_ABOVE + 1, 60, CONTEXT].map(someTokens);
    const sequences = prompts.map((tokens) => staged.newSequence(tokens.length));
    const found: Float32Array[][] = prompts.map(() => []);
    // Two waves: each request in two chunks, the last request's second one past the switch.
    for (const isSecond of [false, true]) {
      const wave = prompts.map((tokens, i) => {
        const middle = tokens.length >> 1;
        return { sequence: sequences[i]!, tokenIds: isSecond ? tokens.slice(middle) : tokens.slice(0, middle) };
      });
      const rows = await staged.runWave(wave);
      for (const [i, { tokenIds }] of wave.entries()) found[i]!.push(...rows.splice(0, tokenIds.length));
    }
    const worst = [];
    for (const [i, tokens] of prompts.entries()) worst.push(worstOf(found[i]!, await uncut.logits(tokens)));
    console.log(`${name}: worst logit differences ${worst.map((each) => each.toExponential(1)).join(', ')}`);
    expect(Math.max(...worst)).toBeLessThan(bound);
    // The tables matter: the same tokens with those of the other side give something else.
    const other = await staged.runWave([{ sequence: staged.newSequence(), tokenIds: prompts[1]! }]);
    expect(worstOf(other, found[1]!)).toBeGreaterThan(10 * bound);
    await uncut.release();
    await staged.release();
  });

  it('chooses the tokens of the uncut graph while its answer outgrows the short tables', async () => {
    const { uncut, staged } = await load();
    const tokens = someTokens(LONG_ABOVE - 4, 9);
    const greedy = await uncut.greedy(tokens, 12, { ignoreEos: true });
    let sequence = staged.newSequence(tokens.length);
    let pending = [...tokens];
    for (const [step, expected] of greedy.tokenIds.entries()) {
      // What is cached was computed with the short tables: it is computed anew, as the scheduler does.
      if (tokens.length === LONG_ABOVE + 1) [sequence, pending] = [staged.newSequence(), [...tokens]];
      const rows = await staged.runWave([{ sequence, tokenIds: pending }], [pending.length - 1]);
      expect(worstOf(rows, [greedy.logits[step]!])).toBeLessThan(bound);
      if (bound < 1e-3) expect(argmax(rows[0]!)).toBe(expected);
      tokens.push(expected);
      pending = [expected];
    }
    expect(tokens.length).toBeGreaterThan(LONG_ABOVE + 4);
    await uncut.release();
    await staged.release();
  });
});

describe('a choice by length', () => {
  it('that the context never reaches leaves the short tables', async () => {
    const dir = newDir();
    await writeExport(
      dir,
      { operator: 'gqa', longAbove: { tokens: 64, by: 'length' } },
      { contextLength: 64, externalData: true },
    );
    const built = await buildModel(dir, { cacheDir: join(dir, 'cache') });
    expect(built.description.shortSequences).toBeNull();
    const [uncut, staged] = [await UncutReference.load(built), await StagedReference.load(built)];
    const tokens = someTokens(64, 3);
    const found = await staged.runWave([{ sequence: staged.newSequence(), tokenIds: tokens }]);
    expect(worstOf(found, await uncut.logits(tokens))).toBeLessThan(1e-4);
    await uncut.release();
    await staged.release();
  });

  it.each([
    [
      'by the number of new tokens',
      { operator: 'gqa', longAbove: { tokens: LONG_ABOVE, by: 'tokens' } },
      /node '\/If_\d+' \(If\): its condition depends on more than the length of the request/,
    ],
    [
      'by positions, without If',
      { operator: 'gqa', rotary: 'before', longAbove: { tokens: 48, by: 'positions' } },
      /node '\/Add_\d+' \(Add\): '.*' depends on the length of the request/,
    ],
  ] as const)('%s is refused', async (_, form, message) => {
    const dir = newDir();
    await writeGenaiExport(dir, form, { contextLength: CONTEXT });
    const cacheDir = join(dir, 'cache');
    await expect(buildModel(dir, { cacheDir })).rejects.toThrow(message);
    expect(existsSync(cacheDir) ? readdirSync(cacheDir) : []).toEqual([]);
  });

  it.each([
    // The condition becomes something that cannot be evaluated; the branches compute; the tables are used otherwise.
    ['on what cannot be known', '\x22\x07Greater', '\x22\x07Greatex', /\(Greatex\): the operator is not supported/],
    [
      'between branches that compute',
      '/small_rope_caches_graph/cos_cache_small/Constant\x22\x08Constant',
      '/small_rope_caches_graph/cos_cache_small/Constant\x22\x08ConstanX',
      /node '\/If_\d+' \(If\): computes in its branches \(ConstanX '.*'\); only a choice of tables/,
    ],
    ['of a loop', '\x22\x02If', '\x22\x02Lo', /node '\/If_\d+' \(Lo\): has a subgraph, which is not supported/],
  ])('%s is refused', async (_, from, to, message) => {
    const dir = newDir();
    const { path } = await writeGenaiExport(dir, { operator: 'gqa', longAbove: BY_LENGTH }, { contextLength: CONTEXT });
    const bytes = readFileSync(path);
    const at = bytes.indexOf(from, 0, 'latin1');
    expect(at).toBeGreaterThan(0);
    bytes.write(to, at, 'latin1');
    writeFileSync(path, bytes);
    await expect(readModel(dir)).rejects.toThrow(message);
  });
});
