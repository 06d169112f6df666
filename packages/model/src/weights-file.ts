/**
 * Owns writing the weights file: the weights of a layout, converted and laid out as their storage says. It can be
 * killed at any time and called again.
 *
 * Invariants
 * 1. Memory is bounded by the source tensors of one weight (as stored) and one chunk, whatever the model's size.
 * 2. Every source tensor is looked up and shape-checked before the first byte is written.
 * 3. A weight that is NaN or infinite is model_invalid: it would make every answer garbage. Weights that stay in place
 *    are read for that too.
 * 4. A weight enters the journal after its bytes were written, with their checksum. What a journal says is believed
 *    only where the bytes in the file have that checksum.
 */
import { type FileHandle, open, readFile, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { crc32 } from 'node:zlib';
import { float32ToFloat16Bits } from '@lamina/tensor';
import { checkFreeSpace } from './disk-space.ts';
import { readFully, writeFully } from './file-io.ts';
import { modelInvalid } from './model-error.ts';
import { quantizeBlocks, quantizeRows } from './quantize.ts';
import type { Checkpoint } from './safetensors.ts';
import { type StoredTensor, storedTensorsOf, type Weight } from './weight.ts';
import type { WeightLayout } from './weight-layout.ts';
import { openRows } from './weight-source.ts';

export interface WeightsFilePaths {
  readonly weights: string;
  readonly journal: string;
}

const CHUNK_ELEMENTS = 2 * 1024 * 1024;
const CHECK_BYTES = 8 * 1024 * 1024;

/**
 * Writes the weights file, or what is missing of it. `onProgress` gets bytes done, of all that the weights have.
 * Throws model_invalid for tensors that are missing, of another shape, not convertible or not finite; config_invalid
 * if the disk has too little room.
 */
export async function writeWeightsFile(
  paths: WeightsFilePaths,
  layout: WeightLayout,
  checkpoint: Checkpoint,
  onProgress: (doneBytes: number, totalBytes: number) => void,
): Promise<void> {
  for (const weight of layout.all) openRows(weight, checkpoint);
  const totalBytes = layout.all.reduce((sum, weight) => sum + bytesOf(weight), 0);
  const journaled = await readJournal(paths.journal);
  const allocated = await stat(paths.weights).then(
    ({ blocks }) => blocks * 512,
    () => 0,
  );
  await checkFreeSpace(dirname(paths.weights), Math.max(0, layout.totalBytes - allocated), 'the built model');
  const file = await open(paths.weights, journaled.size > 0 && allocated > 0 ? 'r+' : 'w+');
  const journal = await open(paths.journal, 'a');
  try {
    await file.truncate(layout.totalBytes);
    let doneBytes = 0;
    for (const weight of layout.all) {
      const checksum = journaled.get(weight.name);
      if (checksum === undefined || (await checksumOf(file, weight)) !== checksum) {
        const written = await writeWeight(file, weight, checkpoint, (fraction) =>
          onProgress(doneBytes + Math.floor(fraction * bytesOf(weight)), totalBytes),
        );
        await journal.write(`\n${JSON.stringify([weight.name, written])}`);
      }
      doneBytes += bytesOf(weight);
      onProgress(doneBytes, totalBytes);
    }
    await file.datasync();
  } finally {
    await Promise.all([file.close(), journal.close()]);
  }
}

/** Returns the checksum of what was written. */
async function writeWeight(
  file: FileHandle,
  weight: Weight,
  checkpoint: Checkpoint,
  onProgress: (fraction: number) => void,
): Promise<string> {
  const { storage } = weight;
  // Opened here and not before: rows that are read transposed keep their source.
  const rows = openRows(weight, checkpoint);
  const writers = storedTensorsOf(storage).map((tensor) => new TensorWriter(file, tensor));
  const rowsPerChunk = Math.max(1, Math.floor(CHUNK_ELEMENTS / rows.width));
  for (let first = 0; first < rows.rows; first += rowsPerChunk) {
    const values = await rows.read(first, Math.min(rowsPerChunk, rows.rows - first));
    if (!isFinite32(values)) throw notFinite(weight, checkpoint);
    if (storage.kind === 'blocks' || storage.kind === 'integers') {
      const quantize = storage.kind === 'blocks' ? quantizeBlocks : quantizeRows;
      const quantized = quantize(values, rows.width);
      await writers[0]?.write(quantized.values);
      await writers[1]?.write(quantized.scales);
    } else if (storage.kind === 'dense') {
      await writers[0]?.write(storage.tensor.type === 'float16' ? float16Of(values, weight, checkpoint) : values);
    }
    onProgress(Math.min(1, (first + rowsPerChunk) / rows.rows));
  }
  return writers.map(({ checksum }) => checksum).join();
}

/** Writes one stored tensor from its first byte to its last. */
class TensorWriter {
  checksum = 0;
  readonly #file: FileHandle;
  #position: number;

  constructor(file: FileHandle, tensor: StoredTensor) {
    this.#file = file;
    this.#position = tensor.byteOffset;
  }

  async write(data: ArrayBufferView): Promise<void> {
    this.checksum = crc32(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), this.checksum);
    this.#position = await writeFully(this.#file, data, this.#position);
  }
}

/** Checksum of what the file has for `weight`, as writeWeight returns it. */
async function checksumOf(file: FileHandle, weight: Weight): Promise<string> {
  const checksums: number[] = [];
  for (const { byteOffset, byteLength } of storedTensorsOf(weight.storage)) {
    let checksum = 0;
    for (let at = 0; at < byteLength; at += CHECK_BYTES) {
      checksum = crc32(await readFully(file, byteOffset + at, Math.min(CHECK_BYTES, byteLength - at)), checksum);
    }
    checksums.push(checksum);
  }
  return checksums.join();
}

/** Checksums by weight. A line that was cut off counts as not written. */
async function readJournal(path: string): Promise<Map<string, string>> {
  const text = await readFile(path, 'utf8').catch(() => '');
  const entries = new Map<string, string>();
  for (const line of text.split('\n')) {
    try {
      const entry: unknown = JSON.parse(line);
      if (Array.isArray(entry)) entries.set(String(entry[0]), String(entry[1]));
    } catch {
      // Cut off: its weight is written again.
    }
  }
  return entries;
}

/** Bytes of all that a weight is stored as, in place or not. */
function bytesOf({ storage }: Weight): number {
  const tensors = storage.kind === 'in_place' ? storage.tensors : storedTensorsOf(storage);
  return tensors.reduce((sum, { byteLength }) => sum + byteLength, 0);
}

function isFinite32(values: Float32Array): boolean {
  // x - x is 0 for a finite x and NaN for NaN and the infinities, so one sum tells.
  let differences = 0;
  for (let i = 0; i < values.length; i++) differences += values[i]! - values[i]!;
  return differences === 0;
}

function float16Of(values: Float32Array, weight: Weight, checkpoint: Checkpoint): Uint16Array {
  const bits = new Uint16Array(values.length);
  for (let i = 0; i < values.length; i++) {
    bits[i] = float32ToFloat16Bits(values[i]!);
    if ((bits[i]! & 0x7fff) !== 0x7c00) continue;
    const problem = `${namesOf(weight)} has values beyond float16`;
    throw modelInvalid(checkpoint.paths[0] ?? '', problem, 'take other weights than f16');
  }
  return bits;
}

function notFinite(weight: Weight, checkpoint: Checkpoint): Error {
  const problem = `tensor ${namesOf(weight)} has NaN or infinite values`;
  return modelInvalid(checkpoint.paths.join(', '), problem, 'download the checkpoint again');
}

function namesOf({ name, source }: Weight): string {
  return source.kind === 'rotary' ? name : source.tensors.map((tensor) => tensor.name).join(', ');
}
