/**
 * Owns how weights are stored: the formats, which bytes of which file each weight becomes, and what that takes.
 *
 * Invariants
 * 1. A stored tensor is the bytes of one range of one file: the weights file, where ranges are aligned for memory
 *    mapping and never overlap, or a file of the checkpoint, which is only ever read.
 * 2. Plain weights (norms, biases, rotary tables) are float32 in the weights file whatever the format.
 * 3. Offsets in the weights file follow from the configuration and the format alone.
 */
import type { ActivationBits } from './activation-bits.ts';
import type { Checkpoint } from './safetensors.ts';
import {
  BLOCK_SIZE,
  type BlockStorage,
  type IntegerStorage,
  type StoredTensor,
  type StoredType,
  type Weight,
  type WeightRole,
  type WeightSource,
  type WeightStorage,
} from './weight.ts';

/**
 * How matrices, the embedding and the LM head are stored.
 * checkpoint: where they are, in the checkpoint's own files and dtype; nothing is copied.
 * f32, f16: converted, laid out for the operators that use them. int8: integers with a scale per row. int4: in blocks.
 */
export const WEIGHT_FORMATS = ['checkpoint', 'f32', 'f16', 'int8', 'int4'] as const;
export type WeightFormat = (typeof WEIGHT_FORMATS)[number];

/** A page, so that ONNX Runtime maps the file instead of copying it. */
const ALIGNMENT_BYTES = 4096;

const STORED_BYTES: Readonly<Record<StoredType, number>> = { float32: 4, float16: 2, bfloat16: 2, uint8: 1, int8: 1 };
const IN_PLACE_TYPES = { F32: 'float32', F16: 'float16', BF16: 'bfloat16' } as const;

export interface StorageOptions {
  readonly format: WeightFormat;
  readonly activationBits: ActivationBits;
  readonly checkpoint: Checkpoint;
  /** The path by which sessions find a file: relative to the directory that they are told of. */
  locationOf(path: string): string;
  /** Path of the weights file. */
  readonly weightsPath: string;
}

/** Gives every weight its place, in the order of the calls. */
export class WeightPlacer {
  readonly weights: Weight[] = [];
  readonly #options: StorageOptions;
  #end = 0;

  constructor(options: StorageOptions) {
    this.#options = options;
  }

  /** Size of the weights file. */
  get totalBytes(): number {
    return this.#end;
  }

  place(name: string, dims: readonly number[], source: WeightSource, role: WeightRole = 'plain'): Weight {
    const weight = { name, dims, source, role, storage: this.#store(name, dims, source, role) };
    this.weights.push(weight);
    return weight;
  }

  #store(name: string, dims: readonly number[], source: WeightSource, role: WeightRole): WeightStorage {
    const { format } = this.#options;
    if (role === 'plain' || format === 'f32') return this.#dense(name, 'float32', dims);
    if (format === 'f16') return this.#dense(name, 'float16', dims);
    if (format === 'checkpoint') return this.#inPlace(name, dims, source);
    const [rows = 0, width = 0] = role === 'matrix' ? [dims[1], dims[0]] : dims;
    if (format === 'int8') return this.#integers(name, rows, width);
    // GatherBlockQuantized takes whole blocks only; so narrow a table costs nothing.
    if (role === 'table' && width % BLOCK_SIZE !== 0) return this.#dense(name, 'float32', dims);
    return this.#blocks(name, rows, width);
  }

  #dense(name: string, type: StoredType, dims: readonly number[]): WeightStorage {
    return { kind: 'dense', tensor: this.#allocate(name, type, dims) };
  }

  #inPlace(name: string, dims: readonly number[], source: WeightSource): WeightStorage {
    const isOne = source.kind === 'rows' && source.tensors.length === 1;
    if (!isOne && source.kind !== 'transposed') return this.#dense(name, 'float32', dims);
    const tensors = source.tensors.map((part): StoredTensor => {
      const tensor = this.#options.checkpoint.tensor(part.name, part.shape);
      return {
        name: part.name,
        type: IN_PLACE_TYPES[tensor.dtype],
        dims: part.shape,
        location: this.#options.locationOf(tensor.realPath),
        byteOffset: tensor.position,
        byteLength: tensor.byteLength,
      };
    });
    return { kind: 'in_place', tensors, transposed: source.kind === 'transposed' };
  }

  #blocks(name: string, rows: number, width: number): BlockStorage {
    const blocks = Math.ceil(width / BLOCK_SIZE);
    const values = this.#allocate(`${name}.q4`, 'uint8', [rows, blocks, BLOCK_SIZE / 2]);
    const scales = this.#allocate(`${name}.scales`, 'float32', [rows, blocks]);
    return { kind: 'blocks', rows, width, values, scales };
  }

  #integers(name: string, rows: number, width: number): IntegerStorage {
    const values = this.#allocate(`${name}.q8`, 'int8', [rows, width]);
    const scales = this.#allocate(`${name}.scales`, 'float32', [rows]);
    return { kind: 'integers', rows, width, values, scales, activationBits: this.#options.activationBits };
  }

  #allocate(name: string, type: StoredType, dims: readonly number[]): StoredTensor {
    const byteOffset = Math.ceil(this.#end / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
    const byteLength = dims.reduce((a, b) => a * b, STORED_BYTES[type]);
    this.#end = byteOffset + byteLength;
    const { locationOf, weightsPath } = this.#options;
    return { name, type, dims, location: locationOf(weightsPath), byteOffset, byteLength };
  }
}
