/** `lamina model`: what its commands compute and print. The hub has its own test, a whole check is in test/e2e. */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { PullMeter, readModel } from '@lamina/model';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { describeCheck } from '../src/model/check.ts';
import { comparePrompt, type DistributedToken } from '../src/model/compare.ts';
import { describeInspection } from '../src/model/inspect-text.ts';
import { inspectModel } from '../src/model/inspection.ts';
import { interconnectOf } from '../src/model/interconnect.ts';
import { showPull } from '../src/model/progress.ts';
import { bytesText, countText, durationText } from '../src/table.ts';

const ROOT = fileURLToPath(new URL('../../..', import.meta.url));
const TINY = join(ROOT, 'models', 'lamina-tiny');

let scratch: string;

beforeAll(() => {
  scratch = mkdtempSync(join(tmpdir(), 'lamina-model-'));
});

afterAll(() => rmSync(scratch, { recursive: true, force: true }));

function lamina(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  const environment = { PATH: process.env.PATH, LAMINA_CACHE_DIR: scratch, HF_ENDPOINT: 'http://127.0.0.1:9' };
  return spawnSync(process.execPath, [join(ROOT, 'packages', 'cli', 'dist', 'main.js'), ...args], {
    encoding: 'utf8',
    env: environment,
  });
}

describe('the minimum interconnect bandwidth', () => {
  const attention = { numLayers: 80, numHeads: 64, numKvHeads: 8, headDim: 128, scale: 1 };
  const alpha = { value: 0.2, origin: 'assumed' } as const;

  it('is (2 + 2/G) e d B L / (alpha (MTIME + ATIME))', () => {
    const net = interconnectOf({
      attention,
      batch: 100,
      context: 8192,
      parameters: 0,
      weightBytes: 0,
      alpha,
      mtimeMs: 30,
      atimeMs: 50,
    });
    // G = 8, e = 4, d = 8192: 2.25 * 4 * 8192 * 100 * 80 bytes in 0.2 * 80 ms
    expect(net.bytesPerStep).toBe(589_824_000);
    expect(net.minBytesPerSecond).toBeCloseTo(589_824_000 / 0.016, -3);
    expect([net.mtimeMs.origin, net.atimeMs.origin, net.alpha.origin]).toEqual(['given', 'given', 'assumed']);
  });

  it('estimates times that are not given, and says so; a window bounds the attention', () => {
    const input = { attention, batch: 1, context: 1000, parameters: 1e9, weightBytes: 1e9, alpha };
    const all = interconnectOf(input);
    expect(all.mtimeMs).toEqual({ value: 100, origin: 'assumed' });
    expect(interconnectOf({ ...input, batch: 100 }).mtimeMs.value).toBeCloseTo(2000);
    const windowTokens = attention.numLayers === 80 ? Array.from({ length: 80 }, (_, layer) => (layer % 2) * 100) : [];
    expect(interconnectOf({ ...input, attention: { ...attention, windowTokens } }).atimeMs.value).toBeCloseTo(
      all.atimeMs.value * 0.55,
    );
  });
});

describe('lamina model inspect', () => {
  it('shows stages, cut edges and the KV of a token', async () => {
    const model = await inspectModel(TINY, { batch: 32 });
    const { attention } = await readModel(TINY);
    expect(model.attention).toEqual(attention);
    expect(model.weights?.stages).toHaveLength(attention.numLayers + 1);
    // Embedding and head are one tensor: the stages weigh more than the model.
    const { parameters = 0, stages = [] } = model.weights ?? {};
    expect(stages.reduce((sum, stage) => sum + stage.parameters, 0) - parameters).toBe(
      model.vocabSize * model.hiddenSize,
    );
    expect(model.cutEdges.map(({ name, bytesPerToken }) => [name, bytesPerToken])).toEqual([
      ['query', 512],
      ['key', 256],
      ['value', 256],
      ['attention', 512],
      ['hidden', 512],
    ]);
    expect(model.kvBytesPerToken).toEqual({ f16: 1536, f32: 3072 });
    const text = describeInspection(model);
    for (const part of ['7 stages, cut at 6 attention nodes', '1-5 ', 'share the embedding', 'at least']) {
      expect(text).toContain(part);
    }
  });

  it('prints JSON, and refuses a format that there is not', () => {
    const printed = lamina('model', 'inspect', TINY, '--json', '--batch', '4', '--mtime-ms', '1.5');
    expect(JSON.parse(printed.stdout)).toMatchObject({
      modelId: 'lamina-tiny',
      numStages: 7,
      interconnect: { batch: { value: 4 }, mtimeMs: { value: 1.5, origin: 'given' } },
    });
    expect(printed.stderr).toBe('');
    expect(lamina('model', 'inspect', TINY, '--weights', 'int3').stderr).toContain('none of: checkpoint');
  });
});

describe('lamina model synth', () => {
  it('names the shapes that there are', () => {
    const printed = lamina('model', 'synth', 'gpt-5');
    expect(printed).toMatchObject({ status: 1, stdout: '' });
    expect(printed.stderr).toMatch(/smollm2-135m.*llama-3-8b.*\[config_invalid\]/);
    expect(lamina('model', 'synth', 'smollm2-135m', join(scratch, 'x'), '--weights', 'int4').stderr).toContain(
      'bf16 or f16',
    );
    expect(existsSync(join(scratch, 'x'))).toBe(false);
  });
});

describe('lamina model pull', () => {
  it('fails in one line without a network, and for what is no repository', () => {
    expect(lamina('model', 'pull', 'a/b').stderr).toMatch(/^lamina: no connection to .*HF_ENDPOINT \[unavailable\]\n$/);
    expect(lamina('model', 'pull', 'b').stderr).toMatch(/names no repository.*\[config_invalid\]\n$/);
  });

  it('shows rate and time left, on a terminal in one line that is never too wide', () => {
    let nowMs = 0;
    const written: string[] = [];
    const screen = { isTTY: true, columns: 70, write: (text: string) => written.push(text) };
    const shown = showPull(screen, new PullMeter(() => nowMs));
    const progress = { repo: 'a/b', file: 'model-00001-of-00009.safetensors', totalBytes: 100e6, resumedBytes: 20e6 };
    shown.onProgress({ ...progress, doneBytes: 20e6 });
    nowMs = 4000;
    shown.onProgress({ ...progress, doneBytes: 100e6 });
    shown.done();
    expect(written[0]).toBe('a/b: continuing, 19.1 MiB are here already\n');
    const lines = written.slice(1, -1).map((text) => text.replace('\r\u001b[2K', ''));
    expect(lines.every((line) => line.length < 70)).toBe(true);
    expect(lines.at(-1)).toMatch(/100 % 95.4 MiB of 95.4 MiB {3}19.1 MiB\/s/);
    expect(written.at(-1)).toBe('\n');
  });

  it('has no rate from bytes that were there before, and none left over from a file that began anew', () => {
    let nowMs = 0;
    const meter = new PullMeter(() => nowMs);
    expect(meter.update({ doneBytes: 500, totalBytes: 1500 })).toEqual({ bytesPerSecond: 0, secondsLeft: null });
    nowMs = 1000;
    expect(meter.update({ doneBytes: 1000, totalBytes: 1500 })).toEqual({ bytesPerSecond: 500, secondsLeft: 1 });
    nowMs = 1500;
    expect(meter.update({ doneBytes: 0, totalBytes: 1500 }).secondsLeft).toBeNull();
  });
});

describe('lamina model check', () => {
  const logits = [Float32Array.of(0, 3, 1), Float32Array.of(2, 2 - 1e-5, 0)];
  const expected = { tokenIds: [1, 0], logits };
  const logprob = (row: number, token: number): number => {
    const values = logits[row]!;
    return values[token]! - Math.log(values.reduce((sum, value) => sum + Math.exp(value), 0));
  };
  const step = (row: number, token: number, error = 0): DistributedToken => {
    return { token, logprob: logprob(row, token) + error, top: [{ token, logprob: logprob(row, token) }] };
  };

  it('is equal where every token is, and tells the worst difference', () => {
    const comparison = comparePrompt('x', 3, expected, [step(0, 1), step(1, 0, 1e-3)]);
    expect(comparison).toMatchObject({ comparedTokens: 2, difference: null });
    expect(comparison.worstLogprobDifference).toBeCloseTo(1e-3, 6);
    expect(describeCheck([comparison], 2)).toContain('equal: 2 tokens on 2 attention shards');
  });

  it('tells a tie from a difference', () => {
    expect(comparePrompt('x', 3, expected, [step(0, 1), step(1, 1)]).difference).toEqual({
      index: 1,
      expected: 0,
      actual: 1,
      isTie: true,
    });
    const wrong = comparePrompt('x', 3, expected, [step(0, 2), step(1, 0)]);
    expect(wrong).toMatchObject({ comparedTokens: 0, difference: { index: 0, expected: 1, actual: 2, isTie: false } });
    expect(describeCheck([wrong], 2)).toContain('DIFFERENT in 1 of 1 prompts');
  });

  it('is no match where the answer ends early or a log-probability is missing', () => {
    expect(comparePrompt('x', 3, expected, [step(0, 1)]).difference).toMatchObject({ actual: null, isTie: false });
    const missing = comparePrompt('x', 3, expected, [{ ...step(0, 1), logprob: Number.NaN }, step(1, 0)]);
    expect(missing.worstLogprobDifference).toBe(Number.POSITIVE_INFINITY);
  });
});

it('figures are short', () => {
  expect([0, 1023, 1536, 150 * 1024, 3 * 1024 ** 3].map(bytesText)).toEqual([
    '0 B',
    '1023 B',
    '1.5 KiB',
    '150 KiB',
    '3.0 GiB',
  ]);
  expect([7, 1_312_384, 8e9].map(countText)).toEqual(['7', '1.31 M', '8.00 G']);
  expect([0.2, 75, 3725].map(durationText)).toEqual(['0:01', '1:15', '1:02:05']);
});
