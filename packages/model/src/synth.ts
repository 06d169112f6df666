/**
 * Owns writing synthetic models: a published shape with random weights, as a complete Hugging Face directory. For
 * benchmarks, where the arithmetic of a real model is wanted and its answers are not.
 *
 * Invariants
 * 1. The same shape, dtype and seed give the same bytes.
 * 2. Memory is one chunk, whatever the model's size.
 * 3. The directory appears whole or not at all.
 */
import { randomUUID } from 'node:crypto';
import { type FileHandle, mkdir, open, rename, rm, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { float32ToFloat16Bits, LaminaError } from '@lamina/tensor';
import { checkFreeSpace } from './disk-space.ts';
import { writeFully } from './file-io.ts';
import { reasonOf, systemErrorCode } from './model-error.ts';
import {
  SYNTHETIC_SHAPES,
  type SyntheticShape,
  type SyntheticShapeName,
  type SyntheticTensor,
  syntheticConfig,
  syntheticTensors,
} from './synth-shapes.ts';
import { SYNTHETIC_SPECIAL_TOKENS, syntheticTokenizer } from './synth-tokenizer.ts';

export interface SyntheticModelOptions {
  /** Element type of the checkpoint. Default bf16. */
  readonly weights?: 'f16' | 'bf16';
  /** Default 1. */
  readonly seed?: number;
  /** Largest safetensors file, in bytes; a larger model is sharded, with an index. Default 4 GiB. */
  readonly maxShardBytes?: number;
  readonly onProgress?: (writtenBytes: number, totalBytes: number) => void;
}

const CHUNK_ELEMENTS = 4 * 1024 * 1024;
const BYTES_PER_ELEMENT = 2;

/** Writes the model into `dir`, which must not exist or be empty. Throws config_invalid if it cannot be written. */
export async function writeSyntheticModel(
  dir: string,
  shapeOrName: SyntheticShapeName | SyntheticShape,
  options: SyntheticModelOptions = {},
): Promise<void> {
  const { weights = 'bf16', seed = 1, maxShardBytes = 4 * 1024 ** 3, onProgress = () => {} } = options;
  const shape: SyntheticShape = typeof shapeOrName === 'string' ? SYNTHETIC_SHAPES[shapeOrName] : shapeOrName;
  const target = resolve(dir);
  const partial = `${target}.${randomUUID()}.partial`;
  const shards = cutIntoShards([...syntheticTensors(shape)], maxShardBytes);
  const totalBytes = shards.flat().reduce((sum, tensor) => sum + bytesOf(tensor), 0);
  try {
    await mkdir(partial, { recursive: true });
    await checkFreeSpace(dirname(target), totalBytes, 'the synthetic model');
    let writtenBytes = 0;
    const progress = (bytes: number): void => {
      writtenBytes += bytes;
      onProgress(writtenBytes, totalBytes);
    };
    const weightMap: Record<string, string> = {};
    const random = new RandomWords(seed);
    for (const [i, tensors] of shards.entries()) {
      const number = (n: number): string => String(n).padStart(5, '0');
      const isOnly = shards.length === 1;
      const name = isOnly ? 'model.safetensors' : `model-${number(i + 1)}-of-${number(shards.length)}.safetensors`;
      for (const tensor of tensors) weightMap[tensor.name] = name;
      await writeShard(join(partial, name), tensors, weights, random, progress);
    }
    await writeTexts(partial, shape, weights, shards.length > 1 ? { totalBytes, weightMap } : null);
    await rename(partial, target);
  } catch (error) {
    await rm(partial, { recursive: true, force: true }).catch(() => {});
    const code = systemErrorCode(error);
    if (code === '') throw error;
    const isTaken = code === 'ENOTEMPTY' || code === 'EEXIST' || code === 'ENOTDIR';
    const problem = isTaken ? 'it exists already' : reasonOf(error);
    const message = `cannot write the synthetic model to ${target} (${problem}); give a new, writable directory`;
    throw new LaminaError('config_invalid', message, { cause: error });
  }
}

async function writeTexts(
  dir: string,
  shape: SyntheticShape,
  weights: 'f16' | 'bf16',
  index: { readonly totalBytes: number; readonly weightMap: Readonly<Record<string, string>> } | null,
): Promise<void> {
  const json = (name: string, value: unknown): Promise<void> => writeFile(join(dir, name), JSON.stringify(value));
  const { bos, eos } = SYNTHETIC_SPECIAL_TOKENS;
  const [bosTokenId, eosTokenId] = [shape.vocabSize - 2, shape.vocabSize - 1];
  await json('config.json', syntheticConfig(shape, weights === 'f16' ? 'float16' : 'bfloat16'));
  await json('generation_config.json', { bos_token_id: bosTokenId, eos_token_id: eosTokenId, do_sample: false });
  await json('tokenizer_config.json', { bos_token: bos, eos_token: eos, add_bos_token: false });
  await json('tokenizer.json', syntheticTokenizer(shape.vocabSize));
  if (index === null) return;
  const { totalBytes, weightMap } = index;
  await json('model.safetensors.index.json', { metadata: { total_size: totalBytes }, weight_map: weightMap });
}

async function writeShard(
  path: string,
  tensors: readonly SyntheticTensor[],
  weights: 'f16' | 'bf16',
  random: RandomWords,
  onProgress: (bytes: number) => void,
): Promise<void> {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let offset = 0;
  for (const tensor of tensors) {
    const end = offset + bytesOf(tensor);
    header[tensor.name] = {
      dtype: weights === 'f16' ? 'F16' : 'BF16',
      shape: tensor.dims,
      data_offsets: [offset, end],
    };
    offset = end;
  }
  const unpadded = JSON.stringify(header);
  const text = unpadded.padEnd(Math.ceil(unpadded.length / 8) * 8);
  const prefix = Buffer.alloc(8 + text.length);
  prefix.writeBigUInt64LE(BigInt(text.length));
  prefix.write(text, 8, 'latin1');
  const file = await open(path, 'wx');
  try {
    let position = await writeFully(file, prefix, 0);
    for (const tensor of tensors) position = await writeTensor(file, tensor, weights, random, position, onProgress);
  } finally {
    await file.close();
  }
}

/** Writes at `position`; returns the position after the tensor. */
async function writeTensor(
  file: FileHandle,
  tensor: SyntheticTensor,
  weights: 'f16' | 'bf16',
  random: RandomWords,
  start: number,
  onProgress: (bytes: number) => void,
): Promise<number> {
  const quantiles = normalQuantiles(tensor, weights);
  const elements = bytesOf(tensor) / BYTES_PER_ELEMENT;
  let position = start;
  for (let written = 0; written < elements; written += CHUNK_ELEMENTS) {
    const chunk = new Uint16Array(Math.min(CHUNK_ELEMENTS, elements - written));
    random.fill(chunk, quantiles);
    position = await writeFully(file, chunk, position);
    onProgress(chunk.byteLength);
  }
  return position;
}

function bytesOf(tensor: SyntheticTensor): number {
  return tensor.dims.reduce((a, b) => a * b, BYTES_PER_ELEMENT);
}

/** Tensors in order, cut so that no file is larger than `maxShardBytes` (one tensor may be). */
function cutIntoShards(tensors: readonly SyntheticTensor[], maxShardBytes: number): SyntheticTensor[][] {
  const shards: SyntheticTensor[][] = [];
  let size = Number.POSITIVE_INFINITY;
  for (const tensor of tensors) {
    const bytes = bytesOf(tensor);
    if (size + bytes > maxShardBytes) {
      shards.push([]);
      size = 0;
    }
    shards.at(-1)?.push(tensor);
    size += bytes;
  }
  return shards;
}

const QUANTILES = 4096;

/** Bits of equally likely values of the tensor's distribution: drawing one of them is drawing from it. */
function normalQuantiles({ mean, spread }: SyntheticTensor, weights: 'f16' | 'bf16'): Uint16Array {
  return Uint16Array.from({ length: QUANTILES }, (_, i) => {
    const value = mean + spread * normalQuantile((i + 0.5) / QUANTILES);
    if (weights === 'f16') return float32ToFloat16Bits(value);
    return new Uint32Array(Float32Array.of(value).buffer)[0]! >>> 16;
  });
}

/** Inverse of the logistic approximation of the normal distribution: plenty for weights. */
function normalQuantile(probability: number): number {
  return Math.log(probability / (1 - probability)) / 1.702;
}

/** xorshift128: fast, and far better than these weights need. */
class RandomWords {
  readonly #state: Uint32Array;

  constructor(seed: number) {
    this.#state = Uint32Array.of(seed, 0x9e3779b9, 0x243f6a88, 0xb7e15162);
    this.fill(new Uint16Array(64), new Uint16Array(QUANTILES));
  }

  /** Two 12-bit draws per word. */
  fill(target: Uint16Array, quantiles: Uint16Array): void {
    let [x = 0, y = 0, z = 0, w = 0] = this.#state;
    for (let i = 0; i < target.length; i += 2) {
      const t = x ^ (x << 11);
      x = y;
      y = z;
      z = w;
      w = w ^ (w >>> 19) ^ t ^ (t >>> 8);
      target[i] = quantiles[w & 0xfff]!;
      // Out of bounds for the last element of an odd length: typed arrays ignore it.
      target[i + 1] = quantiles[(w >>> 16) & 0xfff]!;
    }
    this.#state.set([x, y, z, w]);
  }
}
