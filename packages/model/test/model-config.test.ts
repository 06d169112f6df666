/** What is read from config.json: facts that differ from layer to layer, and what is refused, by name. */
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LaminaError } from '@lamina/tensor';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { SUPPORTED_MODEL_TYPES } from '../src/architecture.ts';
import { readModel } from '../src/model-description.ts';

const TINY = fileURLToPath(new URL('../../../models/lamina-tiny', import.meta.url));

let scratch = '';
let dir = '';
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'lamina-config-'));
});
afterAll(async () => {
  await rm(scratch, { recursive: true, force: true });
});
beforeEach(async () => {
  dir = join(await mkdtemp(join(scratch, 'test-')), 'model');
  await cp(TINY, dir, { recursive: true });
});

async function editJson(name: string, fields: Record<string, unknown>): Promise<void> {
  const value: Record<string, unknown> = JSON.parse(await readFile(join(dir, name), 'utf8'));
  await writeFile(join(dir, name), JSON.stringify({ ...value, ...fields }));
}

async function expectRefused(file: string, ...fragments: readonly string[]): Promise<void> {
  const error: unknown = await readModel(dir).then(
    () => new Error('it was not refused'),
    (reason: unknown) => reason,
  );
  if (!(error instanceof LaminaError)) throw error;
  expect(error.code).toBe('model_invalid');
  for (const fragment of [join(dir, file), ...fragments]) expect(error.message).toContain(fragment);
  // What is wrong; what to do.
  expect(error.message).toMatch(/: .+; .+/);
}

describe('config.json', () => {
  it.each<[fields: Record<string, unknown>, ...fragments: string[]]>([
    [{ model_type: 'gpt_neox' }, "model_type 'gpt_neox' is not supported yet", ...SUPPORTED_MODEL_TYPES],
    [{ rope_scaling: { rope_type: 'ntk', factor: 8 } }, "rope type 'ntk' is not supported", 'llama3, yarn, longrope'],
    [{ rope_scaling: { type: 'linear' } }, 'no factor'],
    [{ rope_scaling: { rope_type: 'llama3', factor: 8 } }, 'no low_freq_factor'],
    [
      { rope_scaling: { rope_type: 'longrope', short_factor: [1], long_factor: [1] } },
      'short_factor has 1 values, not 16',
    ],
    [{ sliding_window: 128 }, "sliding_window 128 is nothing that model_type 'llama' has"],
    [{ partial_rotary_factor: 0.5 }, 'partial_rotary_factor 0.5 is nothing that llama has'],
    [{ rope_parameters: { partial_rotary_factor: 0.5 } }, 'partial_rotary_factor 0.5 is nothing that llama has'],
    [{ hidden_act: 'relu2' }, "hidden_act 'relu2' is not supported yet", 'silu'],
    [{ model_type: 'gpt2', activation_function: 'relu' }, "activation_function 'relu' is not supported yet"],
    [{ model_type: 'gpt2', scale_attn_by_inverse_layer_idx: true }, 'scale_attn_by_inverse_layer_idx'],
    [{ num_local_experts: 8 }, 'num_local_experts: mixture-of-experts models are not supported yet'],
    [{ num_experts: 64 }, 'mixture-of-experts models are not supported yet'],
    [{ model_type: 'gemma3_text', use_bidirectional_attention: true }, 'only causal decoders'],
    [{ model_type: 'qwen2', use_sliding_window: true, sliding_window: 64, layer_types: ['linear'] }, "'linear'"],
    [{ model_type: 'gemma3' }, 'text_config'],
  ])('is refused with %j', async (fields, ...fragments) => {
    await editJson('config.json', fields);
    await expectRefused('config.json', ...fragments);
  });

  it.each([
    ['llama', {}, undefined],
    ['mistral', { sliding_window: 64 }, [64, 64, 64, 64, 64, 64]],
    ['mistral', { sliding_window: null }, undefined],
    ['mistral', { sliding_window: 4096 }, undefined],
    // The class's default, in a context that outgrows it.
    ['mistral', { max_position_embeddings: 8192 }, Array(6).fill(4096)],
    ['mistral', { max_position_embeddings: 8192, sliding_window: null }, undefined],
    ['phi3', { max_position_embeddings: 8192 }, undefined],
    ['qwen2', { use_sliding_window: true, sliding_window: 64, max_window_layers: 4 }, [0, 0, 0, 0, 64, 64]],
    ['qwen2', { use_sliding_window: false, sliding_window: 64, max_window_layers: 0 }, undefined],
    ['gemma2', { sliding_window: 64 }, [64, 0, 64, 0, 64, 0]],
    ['gemma3_text', { sliding_window: 64 }, [64, 64, 64, 64, 64, 0]],
    ['gemma3_text', { sliding_window: 64, sliding_window_pattern: 2 }, [64, 0, 64, 0, 64, 0]],
    ['smollm3', { use_sliding_window: true, sliding_window: 64 }, [0, 0, 0, 64, 0, 0]],
    [
      'gemma3_text',
      { sliding_window: 64, layer_types: [...Array(5).fill('full_attention'), 'sliding_attention'] },
      [0, 0, 0, 0, 0, 64],
    ],
  ])('of %s with %j has the windows %j', async (modelType, fields, windowTokens) => {
    await editJson('config.json', { model_type: modelType, ...fields });
    expect((await readModel(dir)).attention.windowTokens).toEqual(windowTokens);
  });

  it('takes the sparse text_config of a model of several parts, and what stands beside it', async () => {
    const text = { model_type: 'gemma3_text', num_hidden_layers: 12, vocab_size: 1024, sliding_window: 1024 };
    const json = { model_type: 'gemma3', text_config: text, vision_config: { hidden_size: 8 }, eos_token_id: [1, 106] };
    await writeFile(join(dir, 'config.json'), JSON.stringify(json));
    await writeFile(join(dir, 'generation_config.json'), '{}');
    const model = await readModel(dir);
    expect(model.eosTokenIds).toEqual([1, 106]);
    expect(model.bosTokenId).toBe(2);
    expect(model.attention).toMatchObject({ numLayers: 12, numHeads: 8, numKvHeads: 4, headDim: 256, scale: 1 / 16 });
    expect(model.attention).not.toHaveProperty('softcap');
    expect(model.contextLength).toBe(131_072);
    expect(model.config?.rotaryOfLayer).toEqual([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]);
    expect(model.config?.rotaryTables.map(({ frequencies }) => frequencies[127])).toEqual([
      1_000_000 ** (-127 / 128),
      10_000 ** (-127 / 128),
    ]);
  });

  it('may give the rope of each kind of layer', async () => {
    const rope = {
      full_attention: { rope_type: 'linear', factor: 8, rope_theta: 1e6 },
      sliding_attention: { rope_type: 'default', rope_theta: 500 },
    };
    await editJson('config.json', { model_type: 'gemma3_text', sliding_window: 64, rope_parameters: rope });
    const [full, sliding] = (await readModel(dir)).config?.rotaryTables ?? [];
    expect(full?.frequencies[0]).toBe(1 / 8);
    expect(sliding?.frequencies[1]).toBe(500 ** (-1 / 16));
  });

  it.each([
    [{ sliding_attention: { rope_type: 'default' }, full_attention: { rope_type: 'default' } }],
    [{ full_attention: { rope_type: 'default', rope_theta: 1e6 } }],
    [{ full_attention: { rope_type: 'default' }, sliding_attention: null }],
    [{ sliding_attention: { rope_theta: 10_000 } }],
  ])('leaves the bases of Gemma 3 to its class where %j does not say them', async (rope) => {
    await editJson('config.json', {
      ...{ model_type: 'gemma3_text', rope_theta: undefined, rope_scaling: undefined },
      ...{ sliding_window: 64, rope_parameters: rope },
    });
    const { rotaryTables = [], rotaryOfLayer } = (await readModel(dir)).config ?? {};
    expect(rotaryTables.map(({ frequencies }) => frequencies[1])).toEqual([1e6 ** (-1 / 16), 1e4 ** (-1 / 16)]);
    expect(rotaryOfLayer).toEqual([1, 1, 1, 1, 1, 0]);
  });

  it('gives every rotary table the part for short sequences that one of them has', async () => {
    const factors = { short_factor: Array<number>(16).fill(1), long_factor: Array<number>(16).fill(2) };
    const full = { rope_type: 'longrope', original_max_position_embeddings: 128, ...factors };
    const rope = { full_attention: full, sliding_attention: { rope_type: 'default', rope_theta: 500 } };
    await editJson('config.json', { model_type: 'gemma3_text', sliding_window: 64, rope_parameters: rope });
    const model = await readModel(dir);
    expect(model.shortSequences).toEqual({ numTokens: 128, offset: 1024 });
    const [global, local] = model.config?.rotaryTables ?? [];
    expect(global?.short?.frequencies).not.toEqual(global?.frequencies);
    expect(local?.short).toEqual({ numTokens: 128, frequencies: local?.frequencies });
  });

  it('takes the original length beside the rope fields before the one in them, as Phi-3 does', async () => {
    const ones = Array<number>(16).fill(1);
    const rope = {
      rope_type: 'longrope',
      short_factor: ones,
      long_factor: ones,
      original_max_position_embeddings: 512,
    };
    const original = { original_max_position_embeddings: 256 };
    await editJson('config.json', { model_type: 'phi3', rope_scaling: rope, ...original });
    expect((await readModel(dir)).shortSequences?.numTokens).toBe(256);
  });

  it('serves the length that yarn stretches to, that longrope was trained to, and no more than dynamic is exact for', async () => {
    const yarn = { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 1024 };
    await editJson('config.json', { rope_scaling: yarn });
    expect((await readModel(dir)).contextLength).toBe(4096);
    await editJson('config.json', { rope_scaling: { rope_type: 'dynamic', factor: 4 } });
    expect((await readModel(dir)).contextLength).toBe(1024);
    const ones = Array<number>(16).fill(1);
    const longrope = { type: 'su', short_factor: ones, long_factor: ones };
    const original = { original_max_position_embeddings: 256 };
    await editJson('config.json', { model_type: 'phi3', rope_scaling: longrope, ...original });
    const model = await readModel(dir);
    expect(model.contextLength).toBe(1024);
    expect(model.shortSequences).toEqual({ numTokens: 256, offset: 1024 });
  });
});

describe('files', () => {
  it.each(['pytorch_model.bin', 'pytorch_model-00001-of-00002.bin', 'model.pt', 'consolidated.00.pth'])(
    'refuses %s, which is a pickle, and never opens it',
    async (name) => {
      await rm(join(dir, 'model.safetensors'));
      await writeFile(join(dir, name), 'a pickle');
      await expectRefused(name, 'convert it to safetensors');
    },
  );

  it('leaves a pickle alone that lies beside safetensors', async () => {
    await writeFile(join(dir, 'pytorch_model.bin'), 'a pickle');
    expect((await readModel(dir)).numStages).toBe(7);
  });

  it('refuses a tokenizer that has more tokens than the model has embeddings', async () => {
    await editJson('config.json', { vocab_size: 1000 });
    await expectRefused('tokenizer.json', 'it has 1024 tokens, but config.json says vocab_size 1000');
  });

  it('takes special tokens that are only declared', async () => {
    const added = { id: 1024, content: '<image>', special: true, normalized: false };
    const tokenizer: { added_tokens: unknown[] } = JSON.parse(await readFile(join(dir, 'tokenizer.json'), 'utf8'));
    await editJson('tokenizer.json', { added_tokens: [...tokenizer.added_tokens, added] });
    expect((await readModel(dir)).vocabSize).toBe(1024);
  });
});
