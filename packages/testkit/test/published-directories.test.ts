/**
 * Published ONNX decoders that do not run: each is refused with one error that names the file and the node, operator,
 * input or variant; and nothing of it stays in the cache. Which of several variants is taken.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildModel, readModel } from '@lamina/model';
import { LaminaError } from '@lamina/tensor';
import { type ExportForm, type ExportOptions, writeExport, writeRandomCheckpoint } from '@lamina/testkit';
import { afterAll, describe, expect, it } from 'vitest';

const scratch = mkdtempSync(join(tmpdir(), 'lamina-refusals-'));
afterAll(() => rmSync(scratch, { recursive: true, force: true }));
let numDirs = 0;
const newDir = (): string => join(scratch, `model-${numDirs++}`);

const GQA = { operator: 'gqa' } as const;
const EAGER = { operator: 'eager', scaling: 'mul', mask: 'add' } as const;

/** Writes a decoder and replaces a name in its graph by another of the same length. */
async function writePatched(
  form: ExportForm,
  options: Partial<ExportOptions>,
  from: string,
  to: string,
): Promise<string> {
  const dir = newDir();
  const { path } = await writeExport(dir, form, options);
  expect(to.length).toBe(from.length);
  const bytes = readFileSync(path);
  let count = 0;
  for (let at = bytes.indexOf(from); at >= 0; at = bytes.indexOf(from, at + 1)) {
    bytes.write(to, at, 'latin1');
    count++;
  }
  expect(count).toBeGreaterThan(0);
  writeFileSync(path, bytes);
  return dir;
}

const namesIn = (dir: string): string[] => (existsSync(dir) ? readdirSync(dir) : []);

async function refusalOf(dir: string, variant?: string): Promise<string> {
  const cacheDir = join(dir, 'cache');
  const before = namesIn(cacheDir);
  const error: unknown = await buildModel(dir, { cacheDir, variant }).then(
    () => undefined,
    (cause: unknown) => cause,
  );
  if (!(error instanceof LaminaError)) throw new TypeError(`not refused: ${String(error)}`);
  expect(error.code).toBe('model_invalid');
  expect(namesIn(cacheDir)).toEqual(before);
  return error.message;
}

describe('a published decoder is refused', () => {
  it('with an operator on its way that is not known', async () => {
    const dir = await writePatched(GQA, {}, 'Sigmoid', 'Sigmoix');
    expect(await refusalOf(dir)).toMatch(
      /model\.onnx: node '\/Sigmoix_\d+' \(Sigmoix\): the operator is not supported; use .* GroupQueryAttention/,
    );
  });

  it('with an attention operator that is not known', async () => {
    const dir = await writePatched(GQA, {}, 'GroupQueryAttention', 'GroupQueryAttentiox');
    expect(await refusalOf(dir)).toMatch(
      /node '\/GroupQueryAttentiox_\d+' \(com\.microsoft\.GroupQueryAttentiox\): the operator is not supported/,
    );
  });

  it('with attention that is no softmax', async () => {
    const dir = await writePatched(EAGER, {}, 'Softmax', 'Sigmoid');
    expect(await refusalOf(dir)).toMatch(/node '\/MatMul_\d+' \(MatMul\): attention takes .*, not Q, K and V/);
  });

  it('with a mask that is not causal', async () => {
    const dir = newDir();
    await writeExport(dir, { ...EAGER, window: -3 });
    expect(await refusalOf(dir)).toMatch(/node '\/MatMul_\d+' \(MatMul\): its mask is not causal/);
  });

  it('with attention that computes something else', async () => {
    // The hyperbolic tangent of the soft-cap becomes another function.
    const dir = await writePatched({ ...EAGER, softcap: 5 }, {}, 'Tanh', 'Ceil');
    expect(await refusalOf(dir)).toMatch(/node '\/MatMul_\d+' \(MatMul\): it is not plain softmax attention/);
  });

  it('with an input of a kind that is not known', async () => {
    const dir = await writePatched(GQA, {}, 'attention_mask', 'inputs_embeds_');
    expect(await refusalOf(dir)).toMatch(/input 'inputs_embeds_' is of a kind that is not supported/);
  });

  it('when it is cut off or no model at all', async () => {
    const dir = newDir();
    const { path } = await writeExport(dir, GQA);
    truncateSync(path, readFileSync(path).byteLength - 100);
    expect(await refusalOf(dir)).toMatch(/model\.onnx: is cut off or no ONNX model; download the file again/);
    writeFileSync(path, 'not a model');
    expect(await refusalOf(dir)).toMatch(/model\.onnx: is (cut off or )?no ONNX model/);
  });

  it('with weights beside it that are missing, cut off or elsewhere', async () => {
    const dir = newDir();
    const { path } = await writeExport(dir, GQA, { externalData: true });
    truncateSync(`${path}_data`, 5000);
    expect(await refusalOf(dir)).toMatch(/model\.onnx_data: is 5000 bytes long, but .* should end at \d+/);
    rmSync(`${path}_data`);
    expect(await refusalOf(dir)).toMatch(/model\.onnx_data: cannot be read .*keeps weights in it/);
    const outside = await writePatched(GQA, { externalData: true }, 'model.onnx_data', '../model.onnx_d');
    expect(await refusalOf(outside)).toMatch(/is said to lie at '\.\.\/model\.onnx_d', outside the model/);
  });
});

describe('what is carried between stages', () => {
  it.each([
    ['plain', GQA, 64],
    // Norms with a skip give the sum and the norm at once; written out, the norm can be had from the sum.
    ['parallel', GQA, 128],
    ['parallel', EAGER, 64],
    ['embedding', GQA, 128],
  ] as const)('of %s residuals (%o) is %d wide', async (residual, form, width) => {
    const dir = newDir();
    await writeExport(dir, form, { residual });
    expect((await readModel(dir)).hiddenSize).toBe(width);
  });

  it('no weight is twice in the built files, though embedding and head are one', async () => {
    const dir = newDir();
    const { options } = await writeExport(dir, EAGER, { tied: true, vocabSize: 4000 });
    const { weightBytes } = await buildModel(dir, { cacheDir: join(dir, 'cache') });
    expect(weightBytes).toBeLessThan(4000 * options.hiddenSize * 4 * 1.5);
  });
});

describe('of several variants', () => {
  it('the one that is asked for is taken, else fp32, else the only one', async () => {
    const dir = newDir();
    const cacheDir = join(dir, 'cache');
    await writeExport(dir, GQA, { precision: 'q4' });
    expect((await buildModel(dir, { cacheDir })).uncutGraphPath).toMatch(/model_q4\.onnx$/);
    await writeExport(dir, GQA, { precision: 'fp16' });
    expect(await refusalOf(dir)).toMatch(/has the variants fp16, q4; name one that it has/);
    await expect(readModel(dir)).rejects.toThrow(/has the variants fp16, q4/);
    expect((await buildModel(dir, { cacheDir, variant: 'fp16' })).uncutGraphPath).toMatch(/model_fp16\.onnx$/);
    await writeExport(dir, GQA);
    expect((await buildModel(dir, { cacheDir })).uncutGraphPath).toMatch(/model\.onnx$/);
    await expect(buildModel(dir, { cacheDir, variant: 'int8' })).rejects.toThrow(
      /has the variants fp16, fp32, q4, not int8/,
    );
  });

  it('safetensors win, unless a variant is named', async () => {
    const dir = newDir();
    const cacheDir = join(dir, 'cache');
    await writeExport(dir, GQA);
    await writeRandomCheckpoint(dir);
    expect((await buildModel(dir, { cacheDir })).uncutKind).toBe('built');
    expect((await buildModel(dir, { cacheDir, variant: 'fp32' })).uncutKind).toBe('published');
  });

  it('the layout of onnxruntime-genai is read: model.onnx beside genai_config.json', async () => {
    const dir = newDir();
    const { path } = await writeExport(dir, GQA);
    writeFileSync(join(dir, 'model.onnx'), readFileSync(path));
    rmSync(join(dir, 'onnx'), { recursive: true });
    rmSync(join(dir, 'config.json'));
    const model = { context_length: 96, eos_token_id: [7], bos_token_id: 1 };
    writeFileSync(join(dir, 'genai_config.json'), JSON.stringify({ model }));
    const { description } = await buildModel(dir, { cacheDir: join(dir, 'cache') });
    expect(description).toMatchObject({ contextLength: 96, bosTokenId: 1, vocabSize: 264, numStages: 4 });
  });
});
