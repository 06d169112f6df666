/**
 * Owns independent forward passes in plain float64, one for each architecture, to check the graphs against. They read
 * config.json and model.safetensors by themselves and share no code with the builder or with ONNX Runtime.
 *
 * Invariants
 * 1. Each is written after Hugging Face's modeling code (modeling_*.py), one function per kind of layer, token by token
 *    and element by element; speed does not matter.
 * 2. The whole sequence is computed at once: what depends on its length (longrope) is decided by the whole length.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { gemmaLayer, gpt2Layer, llamaLayer, olmo2Layer, phi3Layer, qwen3Layer } from './reference-plain-layers.ts';
import { add, layerNorm, multiply, type Rows, rmsNorm, tanhCap } from './reference-plain-math.ts';
import { type PlainConfig, PlainModel } from './reference-plain-model.ts';

/** Logits [vocab] at every position of `tokenIds`. */
export type PlainForward = (tokenIds: readonly number[]) => Float64Array[];

export async function plainLogits(dir: string, tokenIds: readonly number[]): Promise<Float64Array[]> {
  return (await loadPlain(dir))(tokenIds);
}

/** Reads the single-file checkpoint in `dir` once, for any number of sequences. */
export async function loadPlain(dir: string): Promise<PlainForward> {
  const json: PlainConfig & { text_config?: PlainConfig } = JSON.parse(
    await readFile(join(dir, 'config.json'), 'utf8'),
  );
  const file = await readFile(join(dir, 'model.safetensors'));
  const given = json.text_config === undefined ? json : { ...json.text_config, model_type: 'gemma3_text' };
  const config = withClassDefaults(given);
  switch (config.model_type) {
    case 'gpt2': {
      const model = new PlainModel(config, file, config.tie_word_embeddings === false ? 'transformer.' : '');
      return (tokenIds) => gpt2(model, tokenIds);
    }
    case 'gemma2':
    case 'gemma3_text': {
      const model = new PlainModel(config, file, json.text_config ? 'language_model.model.' : 'model.');
      return (tokenIds) => gemma(model, tokenIds);
    }
    default: {
      const model = new PlainModel(config, file, 'model.');
      return (tokenIds) => llamaLike(model, tokenIds);
    }
  }
}

/** What a published config.json may leave out. */
function withClassDefaults(config: PlainConfig): PlainConfig {
  const isGemma = config.model_type.startsWith('gemma');
  const ownHeadDims: Readonly<Record<string, number>> = { qwen3: 128, gemma2: 256, gemma3_text: 256 };
  const epsilons: Readonly<Record<string, number>> = { phi3: 1e-5, olmo2: 1e-5 };
  const bases: Readonly<Record<string, number>> = { smollm3: 2_000_000, gemma3_text: 1_000_000 };
  const original = config.model_type === 'phi3' ? { original_max_position_embeddings: 4096 } : {};
  return {
    rms_norm_eps: epsilons[config.model_type] ?? 1e-6,
    rope_theta: bases[config.model_type] ?? 10_000,
    tie_word_embeddings: isGemma || config.model_type === 'smollm3' || config.model_type === 'gpt2',
    head_dim: ownHeadDims[config.model_type] ?? config.hidden_size! / config.num_attention_heads!,
    num_key_value_heads: isGemma ? 4 : config.num_attention_heads!,
    ...(isGemma ? { num_attention_heads: 8 } : {}),
    ...original,
    ...config,
  };
}

/** Llama, and all that differ from it in their layers only. */
function llamaLike(model: PlainModel, tokenIds: readonly number[]): Rows {
  const { config } = model;
  const layers: Readonly<Record<string, typeof llamaLayer>> = {
    llama: llamaLayer,
    mistral: llamaLayer,
    qwen2: llamaLayer,
    smollm3: llamaLayer,
    qwen3: qwen3Layer,
    phi3: phi3Layer,
    olmo2: olmo2Layer,
  };
  const layer = layers[config.model_type];
  if (layer === undefined) throw new Error(`no forward pass of ${config.model_type}`);
  let hidden: Rows = model.embed('embed_tokens', tokenIds);
  for (let i = 0; i < config.num_hidden_layers!; i++) hidden = layer(model, i, hidden);
  const head = config.tie_word_embeddings ? model.weight('embed_tokens') : model.headWeight();
  return hidden.map((x) => multiply(head, rmsNorm(x, model.weight('norm').values, config.rms_norm_eps!)));
}

/** Scaled embeddings, always tied; gammas are stored less 1; the logits may be capped. */
function gemma(model: PlainModel, tokenIds: readonly number[]): Rows {
  const { config } = model;
  const scale = Math.sqrt(config.hidden_size!);
  let hidden: Rows = model.embed('embed_tokens', tokenIds).map((x) => x.map((value) => value * scale));
  for (let i = 0; i < config.num_hidden_layers!; i++) hidden = gemmaLayer(model, i, hidden);
  const defaultCap = config.model_type === 'gemma2' ? 30 : null;
  const cap = config.final_logit_softcapping === undefined ? defaultCap : config.final_logit_softcapping;
  return hidden.map((x) => {
    const logits = multiply(model.weight('embed_tokens'), model.offsetNorm(x, 'norm'));
    return cap === null ? logits : logits.map((logit) => tanhCap(logit, cap));
  });
}

/** Learned positions, norms with a mean and a bias. */
function gpt2(model: PlainModel, tokenIds: readonly number[]): Rows {
  const { config } = model;
  const positions = tokenIds.map((_, position) => position);
  const positionRows = model.embed('wpe', positions);
  let hidden: Rows = model.embed('wte', tokenIds).map((x, p) => add(x, positionRows[p]!));
  for (let i = 0; i < config.n_layer!; i++) hidden = gpt2Layer(model, i, hidden);
  const head = config.tie_word_embeddings === false ? model.headWeight() : model.weight('wte');
  const [gamma, beta] = [model.weight('ln_f').values, model.bias('ln_f')];
  return hidden.map((x) => multiply(head, layerNorm(x, gamma, beta, config.layer_norm_epsilon!)));
}

/** Largest absolute difference of two logit rows. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.POSITIVE_INFINITY;
  let largest = 0;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i]! - b[i]!);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}
