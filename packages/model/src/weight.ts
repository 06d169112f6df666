/**
 * Owns the vocabulary of weights: what one is, what of the checkpoint it is made of, and as which bytes it is stored.
 *
 * Invariants
 * 1. A stored tensor is the bytes of one range of one file.
 */
import type { ActivationBits } from './activation-bits.ts';
import type { RotaryTable } from './rotary.ts';

/** One tensor of the checkpoint that is part of a weight. */
export interface SourceTensor {
  readonly name: string;
  readonly shape: readonly number[];
}

export type WeightSource =
  /** The checkpoint's tensors one after the other (first axis), as they lie. */
  | { readonly kind: 'rows'; readonly tensors: readonly SourceTensor[] }
  /** The checkpoint's [N_i, K] tensors, joined along N and transposed to [K, sum N_i]. */
  | { readonly kind: 'transposed'; readonly tensors: readonly SourceTensor[] }
  /** cos or sin of the rotary angles, [positions, dim / 2]. */
  | {
      readonly kind: 'rotary';
      readonly function: 'cos' | 'sin';
      readonly table: RotaryTable;
      readonly contextLength: number;
    };

export interface Weight {
  readonly name: string;
  readonly dims: readonly number[];
  readonly source: WeightSource;
  readonly role: WeightRole;
  readonly storage: WeightStorage;
}

/** What a weight is used for. matrix: [K, N] of a product. table: [rows, width] of lookups, and of the LM head. */
export type WeightRole = 'plain' | 'matrix' | 'table';

export type StoredType = 'float32' | 'float16' | 'bfloat16' | 'uint8' | 'int8';

export interface StoredTensor {
  readonly name: string;
  readonly type: StoredType;
  readonly dims: readonly number[];
  /** Path of its file, relative to the directory that sessions are told of (BuiltModel.dataDir). */
  readonly location: string;
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** A matrix [N, K] (a table: [rows, width]) as 4-bit values in blocks of BLOCK_SIZE along its rows (quantize.ts). */
export interface BlockStorage {
  readonly kind: 'blocks';
  /** N, and K. */
  readonly rows: number;
  readonly width: number;
  /** uint8 [N, ceil(K / BLOCK_SIZE), BLOCK_SIZE / 2]; of two 4-bit values the first is in the low half. */
  readonly values: StoredTensor;
  /** float32 [N, ceil(K / BLOCK_SIZE)] */
  readonly scales: StoredTensor;
}

/** A matrix [N, K] (a table: [rows, width]) as integers with one scale per row (quantize.ts). */
export interface IntegerStorage {
  readonly kind: 'integers';
  /** N, and K. */
  readonly rows: number;
  readonly width: number;
  /** int8 [N, K] */
  readonly values: StoredTensor;
  /** float32 [N] */
  readonly scales: StoredTensor;
  /** Of what it is multiplied with. */
  readonly activationBits: ActivationBits;
}

export type WeightStorage =
  /** One tensor of the weight's own dims. */
  | { readonly kind: 'dense'; readonly tensor: StoredTensor }
  /** Tensors of the checkpoint: a matrix [K, N], if transposed its parts [N_i, K], joined along N; or a table. */
  | { readonly kind: 'in_place'; readonly tensors: readonly StoredTensor[]; readonly transposed: boolean }
  | BlockStorage
  | IntegerStorage;

/** With a float32 scale each, 4.5 bits a value: what llama.cpp's Q4_0 takes with blocks of 32 and float16 scales. */
export const BLOCK_SIZE = 64;

/** What of a storage lies in the weights file, in the order values, scales. */
export function storedTensorsOf(storage: WeightStorage): readonly StoredTensor[] {
  if (storage.kind === 'in_place') return [];
  return storage.kind === 'dense' ? [storage.tensor] : [storage.values, storage.scales];
}
