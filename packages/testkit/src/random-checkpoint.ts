/**
 * Owns making small random checkpoints in Hugging Face's layout for tests: every architecture, shape and dtype, no
 * download.
 *
 * Invariants
 * 1. The same options give the same bytes.
 * 2. The model is complete: readModel, buildModel and loadTokenizer accept it. Its tokens are the 256 bytes, and id 256
 *    is `<|end|>`.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { float32ToFloat16Bits } from '@lamina/tensor';
import { configOf, type TensorKind, type TensorPlan, tensorsOf } from './random-architectures.ts';
import type { RandomCheckpointOptions } from './random-options.ts';

const RANDOM_CHECKPOINT_DEFAULTS: RandomCheckpointOptions = {
  modelType: 'llama',
  config: {},
  eosTokenId: 256,
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
  await writeTokenizer(dir, options.eosTokenId);
  await writeTensors(dir, options);
  return options;
}

/** Writes generation_config.json and the tokenizer's files. */
export async function writeTokenizer(
  dir: string,
  eosTokenId: RandomCheckpointOptions['eosTokenId'] = END_TOKEN_ID,
): Promise<void> {
  const json = (name: string, value: unknown): Promise<void> => writeFile(join(dir, name), JSON.stringify(value));
  await json('generation_config.json', { eos_token_id: eosTokenId, do_sample: false });
  await json('tokenizer.json', byteTokenizer());
  await json('tokenizer_config.json', { eos_token: END_TOKEN, add_bos_token: false });
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

async function writeTensors(dir: string, options: RandomCheckpointOptions): Promise<void> {
  const random = mulberry32(options.seed);
  const tensors = new Map<string, RawTensor>();
  for (const plan of tensorsOf(options)) {
    const count = plan.shape.reduce((a, b) => a * b, 1);
    const { center, spread } = distributionOf(plan);
    const values = Float32Array.from({ length: count }, () => (random() - 0.5) * spread + center);
    tensors.set(plan.name, { dtype: options.dtype, shape: plan.shape, bytes: encodeValues(values, options.dtype) });
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

/** Norms around 1, everything else so that activations and logits stay of order 1. */
function distributionOf({ kind, inputs }: TensorPlan): { center: number; spread: number } {
  const spreads: Readonly<Record<TensorKind, number>> = {
    norm: 0.5,
    offset_norm: 0.5,
    embedding: 1,
    bias: 1,
    matrix: 4 / Math.sqrt(inputs),
  };
  return { center: kind === 'norm' ? 1 : 0, spread: spreads[kind] };
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
