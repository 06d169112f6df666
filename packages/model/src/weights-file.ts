/**
 * Owns writing the weights file: the checkpoint's tensors, converted to float32 and laid out for the graphs.
 *
 * Invariants
 * 1. Memory is bounded by the source tensors of one weight (as stored) and one output chunk, whatever the model's size.
 * 2. Every source tensor is looked up and shape-checked before the first byte is written.
 * 3. A weight that is NaN or infinite is model_invalid: it would make every answer garbage.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { float16Table } from '@lamina/tensor';
import type { ModelConfig } from './model-config.ts';
import { modelInvalid } from './model-error.ts';
import { BYTES_PER_ELEMENT, type Checkpoint, type WeightDtype, type WeightTensor } from './safetensors.ts';
import type { Weight, WeightLayout } from './weight-layout.ts';

const CHUNK_ELEMENTS = 2 * 1024 * 1024;

/**
 * Writes `path`. `onProgress` gets the written fraction, 0..1.
 * Throws model_invalid for tensors that are missing, of another shape, not convertible or not finite.
 */
export async function writeWeightsFile(
  path: string,
  layout: WeightLayout,
  config: ModelConfig,
  checkpoint: Checkpoint,
  onProgress: (fraction: number) => void,
): Promise<void> {
  const sources = layout.all.map((weight) =>
    weight.source.kind === 'rotary'
      ? []
      : weight.source.tensors.map(({ name, shape }) => checkpoint.tensor(name, shape)),
  );
  const file = await open(path, 'wx');
  try {
    await file.truncate(layout.totalBytes);
    for (const [i, weight] of layout.all.entries()) {
      if (weight.source.kind === 'rotary') await writeRotary(file, weight, weight.source.function, config);
      else if (weight.source.kind === 'rows') await writeRows(file, weight, sources[i] ?? []);
      else await writeTransposed(file, weight, sources[i] ?? []);
      onProgress((weight.byteOffset + weight.byteLength) / layout.totalBytes);
    }
    await file.datasync();
  } finally {
    await file.close();
  }
}

async function writeRows(file: FileHandle, weight: Weight, tensors: readonly WeightTensor[]): Promise<void> {
  let position = weight.byteOffset;
  for (const tensor of tensors) {
    const elements = tensor.shape.reduce((a, b) => a * b, 1);
    const bytesPerElement = BYTES_PER_ELEMENT[tensor.dtype];
    for (let start = 0; start < elements; start += CHUNK_ELEMENTS) {
      const count = Math.min(CHUNK_ELEMENTS, elements - start);
      const raw = await tensor.read(start * bytesPerElement, count * bytesPerElement);
      const values = new Float32Array(count);
      elementReader(tensor.dtype, raw)(0, values, 0, count, 1);
      checkFinite(tensor, values);
      position = await writeAt(file, values, position);
    }
  }
}

/** Sources [N_i, K], target [K, sum N_i]; written in chunks of whole target rows. */
async function writeTransposed(file: FileHandle, weight: Weight, tensors: readonly WeightTensor[]): Promise<void> {
  const [inputs = 0, outputs = 0] = weight.dims;
  const readers: { outputs: number; read: ElementReader; tensor: WeightTensor }[] = [];
  for (const tensor of tensors) {
    const [tensorOutputs = 0] = tensor.shape;
    const raw = await tensor.read(0, tensorOutputs * inputs * BYTES_PER_ELEMENT[tensor.dtype]);
    readers.push({ outputs: tensorOutputs, read: elementReader(tensor.dtype, raw), tensor });
  }
  const rowsPerChunk = Math.max(1, Math.min(inputs, Math.floor(CHUNK_ELEMENTS / outputs)));
  let position = weight.byteOffset;
  for (let row = 0; row < inputs; row += rowsPerChunk) {
    const rows = Math.min(rowsPerChunk, inputs - row);
    const chunk = new Float32Array(rows * outputs);
    let column = 0;
    for (const source of readers) {
      for (let n = 0; n < source.outputs; n++) source.read(n * inputs + row, chunk, column + n, rows, outputs);
      column += source.outputs;
    }
    if (!isFinite32(chunk)) throw notFinite(tensors[0], tensors.map(({ name }) => name).join(', '));
    position = await writeAt(file, chunk, position);
  }
}

/** Angles as Hugging Face computes them: position / theta^(2i / headDim), in float64 here. */
async function writeRotary(
  file: FileHandle,
  weight: Weight,
  kind: 'cos' | 'sin',
  { contextLength, headDim, ropeTheta }: ModelConfig,
): Promise<void> {
  const half = headDim / 2;
  const values = new Float32Array(contextLength * half);
  for (let i = 0; i < half; i++) {
    const frequency = ropeTheta ** (-i / half);
    for (let position = 0; position < contextLength; position++) {
      values[position * half + i] = kind === 'cos' ? Math.cos(position * frequency) : Math.sin(position * frequency);
    }
  }
  await writeAt(file, values, weight.byteOffset);
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

function isFinite32(values: Float32Array): boolean {
  // x - x is 0 for a finite x and NaN for NaN and the infinities, so one sum tells.
  let differences = 0;
  for (let i = 0; i < values.length; i++) differences += values[i]! - values[i]!;
  return differences === 0;
}

function checkFinite(tensor: WeightTensor, values: Float32Array): void {
  if (!isFinite32(values)) throw notFinite(tensor, tensor.name);
}

function notFinite(tensor: WeightTensor | undefined, names: string): Error {
  const problem = `tensor ${names} has NaN or infinite values`;
  return modelInvalid(tensor?.file ?? 'the checkpoint', problem, 'download the checkpoint again');
}

/** Returns the position after what was written. */
async function writeAt(file: FileHandle, values: Float32Array, position: number): Promise<number> {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  let written = 0;
  while (written < bytes.byteLength) {
    written += (await file.write(bytes, written, bytes.byteLength - written, position + written)).bytesWritten;
  }
  return position + bytes.byteLength;
}
