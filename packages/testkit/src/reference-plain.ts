/**
 * Owns an independent Llama forward pass in plain float64, to check the graphs against. It reads config.json and
 * model.safetensors by itself and shares no code with the builder or with ONNX Runtime.
 *
 * Invariants
 * 1. It is written after the paper's equations, token by token and element by element; speed does not matter.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';

interface PlainConfig {
  readonly num_hidden_layers: number;
  readonly num_attention_heads: number;
  readonly num_key_value_heads: number;
  readonly head_dim: number;
  readonly rope_theta: number;
  readonly rms_norm_eps: number;
  readonly tie_word_embeddings: boolean;
}

interface PlainTensor {
  readonly values: Float64Array;
  readonly shape: readonly number[];
}

/** Logits [vocab] at every position of `tokenIds`, for the single-file checkpoint in `dir`. */
export async function plainLogits(dir: string, tokenIds: readonly number[]): Promise<Float64Array[]> {
  const config: PlainConfig = JSON.parse(await readFile(join(dir, 'config.json'), 'utf8'));
  const tensors = readTensors(await readFile(join(dir, 'model.safetensors')));
  const weight = (name: string): PlainTensor => {
    const tensor = tensors.get(`${name}.weight`);
    if (tensor === undefined) throw new Error(`no tensor ${name}`);
    return tensor;
  };
  const linear = (name: string, x: Float64Array): Float64Array => {
    const y = multiply(weight(name), x);
    const bias = tensors.get(`${name}.bias`);
    return bias === undefined ? y : y.map((value, i) => value + bias.values[i]!);
  };
  const embedding = weight('model.embed_tokens');
  const width = embedding.shape[1]!;
  let hidden: Float64Array[] = tokenIds.map((id) => embedding.values.slice(id * width, (id + 1) * width));
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const prefix = `model.layers.${layer}`;
    const normed = hidden.map((x) => rmsNorm(x, weight(`${prefix}.input_layernorm`), config.rms_norm_eps));
    const queries = normed.map((x, p) => rotate(linear(`${prefix}.self_attn.q_proj`, x), p, config));
    const keys = normed.map((x, p) => rotate(linear(`${prefix}.self_attn.k_proj`, x), p, config));
    const values = normed.map((x) => linear(`${prefix}.self_attn.v_proj`, x));
    hidden = hidden.map((x, p) => {
      const attended = attend(queries[p]!, keys.slice(0, p + 1), values.slice(0, p + 1), config);
      const middle = add(x, linear(`${prefix}.self_attn.o_proj`, attended));
      const y = rmsNorm(middle, weight(`${prefix}.post_attention_layernorm`), config.rms_norm_eps);
      const up = linear(`${prefix}.mlp.up_proj`, y);
      const gated = linear(`${prefix}.mlp.gate_proj`, y).map((g, i) => (g / (1 + Math.exp(-g))) * up[i]!);
      return add(middle, linear(`${prefix}.mlp.down_proj`, gated));
    });
  }
  const head = config.tie_word_embeddings ? embedding : weight('lm_head');
  return hidden.map((x) => multiply(head, rmsNorm(x, weight('model.norm'), config.rms_norm_eps)));
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

function multiply({ values, shape }: PlainTensor, x: Float64Array): Float64Array {
  const [outputs = 0, inputs = 0] = shape;
  const y = new Float64Array(outputs);
  for (let n = 0; n < outputs; n++) {
    let sum = 0;
    for (let k = 0; k < inputs; k++) sum += values[n * inputs + k]! * x[k]!;
    y[n] = sum;
  }
  return y;
}

function add(a: Float64Array, b: Float64Array): Float64Array {
  return a.map((value, i) => value + b[i]!);
}

function rmsNorm(x: Float64Array, gamma: PlainTensor, epsilon: number): Float64Array {
  const meanSquare = x.reduce((sum, value) => sum + value * value, 0) / x.length;
  return x.map((value, i) => (value / Math.sqrt(meanSquare + epsilon)) * gamma.values[i]!);
}

/** Rotates pairs (i, i + headDim / 2) of every head. */
function rotate(x: Float64Array, position: number, config: PlainConfig): Float64Array {
  const headDim = config.head_dim;
  const y = new Float64Array(x.length);
  for (let head = 0; head < x.length; head += headDim) {
    for (let i = 0; i < headDim / 2; i++) {
      const angle = position / config.rope_theta ** ((2 * i) / headDim);
      const [a, b] = [x[head + i]!, x[head + i + headDim / 2]!];
      y[head + i] = a * Math.cos(angle) - b * Math.sin(angle);
      y[head + i + headDim / 2] = b * Math.cos(angle) + a * Math.sin(angle);
    }
  }
  return y;
}

function attend(
  query: Float64Array,
  keys: readonly Float64Array[],
  values: readonly Float64Array[],
  config: PlainConfig,
): Float64Array {
  const { num_attention_heads: numHeads, num_key_value_heads: numKvHeads, head_dim: headDim } = config;
  const output = new Float64Array(numHeads * headDim);
  for (let head = 0; head < numHeads; head++) {
    const kvHead = Math.floor((head * numKvHeads) / numHeads);
    const scores = keys.map((key) => {
      let dot = 0;
      for (let d = 0; d < headDim; d++) dot += query[head * headDim + d]! * key[kvHead * headDim + d]!;
      return dot / Math.sqrt(headDim);
    });
    const largest = Math.max(...scores);
    const weights = scores.map((score) => Math.exp(score - largest));
    const total = weights.reduce((a, b) => a + b, 0);
    for (const [token, value] of values.entries()) {
      for (let d = 0; d < headDim; d++) {
        output[head * headDim + d]! += (weights[token]! / total) * value[kvHead * headDim + d]!;
      }
    }
  }
  return output;
}

function readTensors(file: Buffer): Map<string, PlainTensor> {
  const headerBytes = Number(file.readBigUInt64LE(0));
  const header: Record<string, { dtype: string; shape: number[]; data_offsets: [number, number] }> = JSON.parse(
    file.toString('utf8', 8, 8 + headerBytes),
  );
  const tensors = new Map<string, PlainTensor>();
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header)) {
    if (name === '__metadata__') continue;
    const data = file.subarray(8 + headerBytes + offsets[0], 8 + headerBytes + offsets[1]);
    const count = shape.reduce((a, b) => a * b, 1);
    tensors.set(name, { shape, values: Float64Array.from({ length: count }, (_, i) => element(data, dtype, i)) });
  }
  return tensors;
}

function element(data: Buffer, dtype: string, i: number): number {
  if (dtype === 'F32') return data.readFloatLE(i * 4);
  const bits = data.readUInt16LE(i * 2);
  if (dtype === 'BF16') {
    const word = Buffer.alloc(4);
    word.writeUInt16LE(bits, 2);
    return word.readFloatLE(0);
  }
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const magnitude = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
