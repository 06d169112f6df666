/**
 * Owns making small random Llama checkpoints in Hugging Face's layout for tests: every shape and dtype, no download.
 *
 * Invariants
 * 1. The same options give the same bytes.
 * 2. The model is complete: readModel, buildModel and loadTokenizer accept it. Its tokens are the 256 bytes, and id 256
 *    is `<|end|>`.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { float32ToFloat16Bits } from '@lamina/tensor';

export interface RandomCheckpointOptions {
  readonly numLayers: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly numHeads: number;
  readonly numKvHeads: number;
  /** A multiple of 16: ONNX Runtime's GroupQueryAttention takes no other. */
  readonly headDim: number;
  /** At least 257. */
  readonly vocabSize: number;
  readonly contextLength: number;
  readonly ropeTheta: number;
  readonly dtype: 'F32' | 'F16' | 'BF16';
  readonly tied: boolean;
  readonly attentionBias: boolean;
  readonly mlpBias: boolean;
  /** 1: model.safetensors; more: that many files and an index. */
  readonly shards: number;
  readonly seed: number;
}

const RANDOM_CHECKPOINT_DEFAULTS: RandomCheckpointOptions = {
  numLayers: 3,
  hiddenSize: 32,
  intermediateSize: 48,
  numHeads: 4,
  numKvHeads: 2,
  headDim: 16,
  vocabSize: 264,
  contextLength: 96,
  ropeTheta: 10000,
  dtype: 'F32',
  tied: true,
  attentionBias: false,
  mlpBias: false,
  shards: 1,
  seed: 1,
};

const END_TOKEN = '<|end|>';
const END_TOKEN_ID = 256;

/** A tensor of a safetensors file: raw little-endian bytes of `shape` in `dtype`. */
export interface RawTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

/** Writes a checkpoint into `dir` (created if missing). Options that are not given are small defaults. */
export async function writeRandomCheckpoint(
  dir: string,
  given: Partial<RandomCheckpointOptions> = {},
): Promise<RandomCheckpointOptions> {
  const options = { ...RANDOM_CHECKPOINT_DEFAULTS, ...given };
  await mkdir(dir, { recursive: true });
  const json = (name: string, value: unknown): Promise<void> => writeFile(join(dir, name), JSON.stringify(value));
  await json('config.json', configOf(options));
  await json('generation_config.json', { eos_token_id: [END_TOKEN_ID], do_sample: false });
  await json('tokenizer.json', byteTokenizer());
  await json('tokenizer_config.json', { eos_token: END_TOKEN, add_bos_token: false });
  await writeTensors(dir, options);
  return options;
}

/** The bytes of one safetensors file. */
function encodeSafetensors(tensors: ReadonlyMap<string, RawTensor>): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let offset = 0;
  for (const [name, { dtype, shape, bytes }] of tensors) {
    header[name] = { dtype, shape, data_offsets: [offset, offset + bytes.byteLength] };
    offset += bytes.byteLength;
  }
  // The format pads the header with spaces, so that the data is aligned.
  const unpadded = JSON.stringify(header);
  const text = Buffer.from(unpadded.padEnd(Math.ceil(unpadded.length / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.byteLength));
  return Buffer.concat([length, text, ...[...tensors.values()].map(({ bytes }) => bytes)]);
}

function configOf(options: RandomCheckpointOptions): Record<string, unknown> {
  return {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: options.hiddenSize,
    intermediate_size: options.intermediateSize,
    num_hidden_layers: options.numLayers,
    num_attention_heads: options.numHeads,
    num_key_value_heads: options.numKvHeads,
    head_dim: options.headDim,
    hidden_act: 'silu',
    max_position_embeddings: options.contextLength,
    rms_norm_eps: 1e-5,
    rope_theta: options.ropeTheta,
    rope_scaling: null,
    tie_word_embeddings: options.tied,
    vocab_size: options.vocabSize,
    attention_bias: options.attentionBias,
    mlp_bias: options.mlpBias,
    eos_token_id: END_TOKEN_ID,
  };
}

async function writeTensors(dir: string, options: RandomCheckpointOptions): Promise<void> {
  const names = [...tensorShapes(options)];
  const random = mulberry32(options.seed);
  const tensors = new Map<string, RawTensor>();
  for (const [name, shape] of names) {
    const count = shape.reduce((a, b) => a * b, 1);
    // Norms around 1, everything else so that activations and logits stay of order 1.
    const isNorm = name.includes('norm');
    const spread = isNorm ? 0.5 : name.includes('embed') || name.endsWith('bias') ? 1 : 4 / Math.sqrt(shape[1] ?? 1);
    const values = Float32Array.from({ length: count }, () => (random() - 0.5) * spread + (isNorm ? 1 : 0));
    tensors.set(name, { dtype: options.dtype, shape, bytes: encodeValues(values, options.dtype) });
  }
  if (options.shards === 1) {
    await writeFile(join(dir, 'model.safetensors'), encodeSafetensors(tensors));
    return;
  }
  const weightMap: Record<string, string> = {};
  for (let shard = 0; shard < options.shards; shard++) {
    const file = `model-${shard + 1}-of-${options.shards}.safetensors`;
    const part = new Map([...tensors].filter((_, i) => i % options.shards === shard));
    for (const name of part.keys()) weightMap[name] = file;
    await writeFile(join(dir, file), encodeSafetensors(part));
  }
  await writeFile(join(dir, 'model.safetensors.index.json'), JSON.stringify({ weight_map: weightMap }));
}

function* tensorShapes(options: RandomCheckpointOptions): Generator<readonly [string, readonly number[]]> {
  const { hiddenSize, intermediateSize, vocabSize, attentionBias, mlpBias } = options;
  const queryWidth = options.numHeads * options.headDim;
  const kvWidth = options.numKvHeads * options.headDim;
  yield ['model.embed_tokens.weight', [vocabSize, hiddenSize]];
  for (let layer = 0; layer < options.numLayers; layer++) {
    const prefix = `model.layers.${layer}`;
    const linears = [
      ['self_attn.q_proj', queryWidth, hiddenSize, attentionBias],
      ['self_attn.k_proj', kvWidth, hiddenSize, attentionBias],
      ['self_attn.v_proj', kvWidth, hiddenSize, attentionBias],
      ['self_attn.o_proj', hiddenSize, queryWidth, attentionBias],
      ['mlp.gate_proj', intermediateSize, hiddenSize, mlpBias],
      ['mlp.up_proj', intermediateSize, hiddenSize, mlpBias],
      ['mlp.down_proj', hiddenSize, intermediateSize, mlpBias],
    ] as const;
    for (const [name, outputs, inputs, bias] of linears) {
      yield [`${prefix}.${name}.weight`, [outputs, inputs]];
      if (bias) yield [`${prefix}.${name}.bias`, [outputs]];
    }
    yield [`${prefix}.input_layernorm.weight`, [hiddenSize]];
    yield [`${prefix}.post_attention_layernorm.weight`, [hiddenSize]];
  }
  yield ['model.norm.weight', [hiddenSize]];
  if (!options.tied) yield ['lm_head.weight', [vocabSize, hiddenSize]];
}

function encodeValues(values: Float32Array, dtype: RandomCheckpointOptions['dtype']): Uint8Array {
  if (dtype === 'F32') return new Uint8Array(values.buffer);
  const bits =
    dtype === 'F16'
      ? Uint16Array.from(values, float32ToFloat16Bits)
      : Uint16Array.from(new Uint32Array(values.buffer), (word) => word >>> 16);
  return new Uint8Array(bits.buffer);
}

/** GPT-2's printable alphabet for the 256 bytes, no merges. */
function byteTokenizer(): Record<string, unknown> {
  const vocab: Record<string, number> = {};
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte !== 0xad);
    vocab[String.fromCharCode(printable ? byte : next++)] = byte;
  }
  return {
    version: '1.0',
    added_tokens: [{ id: END_TOKEN_ID, content: END_TOKEN, special: true, normalized: false }],
    normalizer: null,
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: false },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges: [] },
  };
}

/** Uniform in [0, 1), 32 bits of state. */
function mulberry32(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}
