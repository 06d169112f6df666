/**
 * Owns reading what a weight is made of, as float32 rows: from the checkpoint as it lies, transposed, or computed.
 *
 * Invariants
 * 1. Memory is bounded by the asked rows; transposed also by the source tensors of one weight, as stored.
 * 2. Every source tensor is looked up and shape-checked when its rows are opened, before any is read.
 */
import { float16Table } from '@lamina/tensor';
import { rotaryValues } from './rotary.ts';
import { BYTES_PER_ELEMENT, type Checkpoint, type WeightDtype, type WeightTensor } from './safetensors.ts';
import type { Weight, WeightSource } from './weight.ts';

type RotarySource = Extract<WeightSource, { kind: 'rotary' }>;

/** A [rows, width] view of a weight's values. */
export interface ValueRows {
  readonly rows: number;
  readonly width: number;
  /** Rows first..first + count - 1. */
  read(first: number, count: number): Promise<Float32Array>;
}

/** The rows that `weight` is stored as: [N, K] of a quantized or in-place matrix, else its own first axis. */
export function openRows(weight: Weight, checkpoint: Checkpoint): ValueRows {
  const { source, storage, role, dims } = weight;
  if (source.kind === 'rotary') return rotaryRows(weight, source);
  const tensors = source.tensors.map(({ name, shape }) => checkpoint.tensor(name, shape));
  const shape = tensors[0]?.shape ?? [];
  // Vectors of several lengths may be joined: the biases of Q, K and V.
  const width = shape.length === 1 ? 1 : (shape.at(-1) ?? 0);
  if (storage.kind === 'in_place' || role !== 'matrix') return rowsAsTheyLie(tensors, width);
  // [N, K] is wanted of a quantized matrix, [K, N] of any other.
  const isWantedByOutputs = storage.kind !== 'dense';
  const liesByOutputs = source.kind === 'transposed';
  if (isWantedByOutputs === liesByOutputs) return rowsAsTheyLie(tensors, width);
  return transposedRows(tensors, width, dims);
}

/** The tensors one after the other, cut into rows of `width`. */
function rowsAsTheyLie(tensors: readonly WeightTensor[], width: number): ValueRows {
  const rowsOf = (tensor: WeightTensor): number => elementsOf(tensor) / width;
  return {
    rows: tensors.reduce((sum, tensor) => sum + rowsOf(tensor), 0),
    width,
    async read(first, count) {
      const values = new Float32Array(count * width);
      let tensorFirst = 0;
      for (const tensor of tensors) {
        const begin = Math.max(first, tensorFirst);
        const end = Math.min(first + count, tensorFirst + rowsOf(tensor));
        if (begin < end) {
          const bytesPerRow = BYTES_PER_ELEMENT[tensor.dtype] * width;
          const raw = await tensor.read((begin - tensorFirst) * bytesPerRow, (end - begin) * bytesPerRow);
          elementReader(tensor.dtype, raw)(0, values, (begin - first) * width, (end - begin) * width, 1);
        }
        tensorFirst += rowsOf(tensor);
      }
      return values;
    },
  };
}

/** Tensors [R_i, width], joined along R and transposed: [width, sum R_i]. */
function transposedRows(tensors: readonly WeightTensor[], width: number, dims: readonly number[]): ValueRows {
  const outputs = dims.reduce((a, b) => a * b, 1) / width;
  let loaded: Promise<{ readonly rows: number; readonly read: ElementReader }[]> | undefined;
  const load = (): NonNullable<typeof loaded> =>
    Promise.all(
      tensors.map(async (tensor) => {
        const raw = await tensor.read(0, tensor.byteLength);
        return { rows: elementsOf(tensor) / width, read: elementReader(tensor.dtype, raw) };
      }),
    );
  return {
    rows: width,
    width: outputs,
    async read(first, count) {
      loaded ??= load();
      const values = new Float32Array(count * outputs);
      let column = 0;
      for (const part of await loaded) {
        for (let row = 0; row < part.rows; row++) part.read(row * width + first, values, column + row, count, outputs);
        column += part.rows;
      }
      return values;
    },
  };
}

function rotaryRows({ dims: [rows = 0, width = 0] }: Weight, source: RotarySource): ValueRows {
  const { table, contextLength, function: kind } = source;
  return { rows, width, read: async (first, count) => rotaryValues(table, kind, contextLength, first, count) };
}

function elementsOf(tensor: WeightTensor): number {
  return tensor.shape.reduce((a, b) => a * b, 1);
}

/** Converts `count` consecutive source elements from `start` into target[offset], target[offset + stride], ... */
type ElementReader = (start: number, target: Float32Array, offset: number, count: number, stride: number) => void;

function elementReader(dtype: WeightDtype, raw: Buffer): ElementReader {
  if (dtype === 'F16') {
    const bits = new Uint16Array(raw.buffer, raw.byteOffset, raw.byteLength / 2);
    const table = float16Table();
    return (start, target, offset, count, stride) => {
      for (let i = 0, to = offset; i < count; i++, to += stride) target[to] = table[bits[start + i]!]!;
    };
  }
  if (dtype === 'BF16') {
    const bits = new Uint16Array(raw.buffer, raw.byteOffset, raw.byteLength / 2);
    return (start, target, offset, count, stride) => {
      const targetBits = new Uint32Array(target.buffer, target.byteOffset, target.length);
      for (let i = 0, to = offset; i < count; i++, to += stride) targetBits[to] = bits[start + i]! << 16;
    };
  }
  const values = new Float32Array(raw.buffer, raw.byteOffset, raw.byteLength / 4);
  return (start, target, offset, count, stride) => {
    for (let i = 0, to = offset; i < count; i++, to += stride) target[to] = values[start + i]!;
  };
}
