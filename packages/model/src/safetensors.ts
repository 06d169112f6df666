/**
 * Owns the safetensors format: 8 bytes header length (little-endian), a JSON header, raw row-major tensor bytes.
 *
 * Invariants
 * 1. Every offset of the header is checked against the file's size, the tensor's shape and its neighbours before a
 *    byte of data is read; a truncated or damaged file is model_invalid, never a short read.
 * 2. Reads are positional and of the asked range only; nothing is kept in memory but the header.
 * 3. A sharded checkpoint (model.safetensors.index.json) and a single file look the same to the caller. As in
 *    transformers an index is not looked at where there is a single file: saving a model again leaves the old one.
 */
import { createHash } from 'node:crypto';
import { type FileHandle, open, realpath, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { modelInvalid, reasonOf, systemErrorCode } from './model-error.ts';
import { parseFile, readOptionalJson } from './model-files.ts';

/** Element types that the builder can convert to float32. */
export type WeightDtype = 'F32' | 'F16' | 'BF16';

export const BYTES_PER_ELEMENT: Readonly<Record<WeightDtype, number>> = { F32: 4, F16: 2, BF16: 2 };

/** All element types whose size the header check knows. */
const ELEMENT_BYTES: ReadonlyMap<string, number> = new Map([
  ...['BOOL', 'U8', 'I8', 'F8_E4M3', 'F8_E5M2'].map((dtype) => [dtype, 1] as const),
  ...['U16', 'I16', 'F16', 'BF16'].map((dtype) => [dtype, 2] as const),
  ...['U32', 'I32', 'F32'].map((dtype) => [dtype, 4] as const),
  ...['U64', 'I64', 'F64'].map((dtype) => [dtype, 8] as const),
]);

interface SafetensorsFile {
  readonly path: string;
  /** `path` with links followed. */
  readonly realPath: string;
  readonly handle: FileHandle;
  readonly sizeBytes: number;
  readonly header: Buffer;
}

interface StoredTensor {
  readonly file: SafetensorsFile;
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Position in the file, in bytes. */
  readonly start: number;
  readonly byteLength: number;
}

/** A tensor of the checkpoint of an expected shape and a convertible dtype. */
export interface WeightTensor {
  readonly name: string;
  readonly dtype: WeightDtype;
  readonly shape: readonly number[];
  readonly file: string;
  /** Where it lies: in `file` with links followed, from byte `position`. */
  readonly realPath: string;
  readonly position: number;
  readonly byteLength: number;
  /** Reads `byteLength` bytes from `byteOffset` of the tensor's data. */
  read(byteOffset: number, byteLength: number): Promise<Buffer>;
}

const REMEDY = 'download the checkpoint again';
const SINGLE_FILE = 'model.safetensors';
const INDEX_FILE = 'model.safetensors.index.json';
const SAFETENSORS_NAME = /^[^/\\]+\.safetensors$/;
const MAX_HEADER_BYTES = 100_000_000;
/** Files up to this size are hashed whole, larger ones in this many bytes of evenly spread samples. */
const FINGERPRINT_BYTES = 256 * 1024 * 1024;
const FINGERPRINT_SAMPLES = 256;

const indexSchema = z.looseObject({ weight_map: z.record(z.string(), z.string()) });
const count = z.int().nonnegative();
const entrySchema = z.object({
  dtype: z.string(),
  shape: z.array(count),
  data_offsets: z.tuple([count, count]),
});

/** An open checkpoint; `close` it. */
export class Checkpoint {
  readonly #dir: string;
  readonly #files: readonly SafetensorsFile[];
  readonly #tensors: ReadonlyMap<string, StoredTensor>;

  private constructor(dir: string, files: readonly SafetensorsFile[], tensors: ReadonlyMap<string, StoredTensor>) {
    this.#dir = dir;
    this.#files = files;
    this.#tensors = tensors;
  }

  /** Opens the checkpoint of a model directory and checks its headers. Throws model_invalid. */
  static async open(dir: string): Promise<Checkpoint> {
    const index = (await exists(join(dir, SINGLE_FILE))) ? null : await readOptionalJson(dir, INDEX_FILE);
    const fileOf = index === null ? {} : parseFile(dir, INDEX_FILE, indexSchema, index).weight_map;
    const names = index === null ? [SINGLE_FILE] : [...new Set(Object.values(fileOf))].sort();
    const files: SafetensorsFile[] = [];
    const tensors = new Map<string, StoredTensor>();
    try {
      for (const name of names) {
        if (!SAFETENSORS_NAME.test(name)) {
          const problem = `weight_map names '${name}', which is no safetensors file beside it`;
          throw modelInvalid(join(dir, INDEX_FILE), problem, REMEDY);
        }
        const file = await openFile(join(dir, name));
        files.push(file);
        for (const [tensorName, tensor] of parseHeader(file)) {
          if ((fileOf[tensorName] ?? name) === name) tensors.set(tensorName, tensor);
        }
      }
      const lost = Object.keys(fileOf).find((tensorName) => !tensors.has(tensorName));
      if (lost !== undefined) {
        const problem = `weight_map says that ${fileOf[lost]} has tensor '${lost}', but it has not`;
        throw modelInvalid(join(dir, INDEX_FILE), problem, REMEDY);
      }
    } catch (error) {
      await closeAll(files);
      throw error;
    }
    return new Checkpoint(dir, files, tensors);
  }

  /** Paths of its files. */
  get paths(): readonly string[] {
    return this.#files.map(({ path }) => path);
  }

  /** Paths of its files, links followed. */
  get realPaths(): readonly string[] {
    return this.#files.map(({ realPath }) => realPath);
  }

  has(name: string): boolean {
    return this.#tensors.has(name);
  }

  /** The tensor `name`, which must have `shape`. Throws model_invalid if it is missing or of another shape or dtype. */
  tensor(name: string, shape: readonly number[]): WeightTensor {
    const stored = this.#tensors.get(name);
    if (stored === undefined) {
      throw modelInvalid(this.#dir, `the checkpoint has no tensor '${name}'`, `${REMEDY}, or correct config.json`);
    }
    const { file, dtype, start, byteLength } = stored;
    if (stored.shape.join() !== shape.join()) {
      const problem = `tensor '${name}' has shape [${stored.shape}], but config.json asks for [${shape}]`;
      throw modelInvalid(file.path, problem, `${REMEDY}, or correct config.json`);
    }
    if (dtype !== 'F32' && dtype !== 'F16' && dtype !== 'BF16') {
      const problem = `tensor '${name}' has dtype '${dtype}', which is not supported yet`;
      throw modelInvalid(file.path, problem, 'use a checkpoint in F32, F16 or BF16');
    }
    return {
      name,
      dtype,
      shape,
      file: file.path,
      realPath: file.realPath,
      position: start,
      byteLength,
      read: (byteOffset, length) => readRange(file, start + byteOffset, Math.min(length, byteLength - byteOffset)),
    };
  }

  /** SHA-256 (hex) of all headers, sizes and contents (large files: of evenly spread samples of it). */
  async fingerprint(): Promise<string> {
    const hash = createHash('sha256');
    for (const file of this.#files) {
      hash.update(`${file.sizeBytes}\n`).update(file.header);
      const whole = file.sizeBytes <= FINGERPRINT_BYTES;
      const sampleBytes = Math.floor(FINGERPRINT_BYTES / FINGERPRINT_SAMPLES);
      const stride = whole ? sampleBytes : (file.sizeBytes - sampleBytes) / (FINGERPRINT_SAMPLES - 1);
      for (let sample = 0; Math.floor(sample * stride) < file.sizeBytes && sample < FINGERPRINT_SAMPLES; sample++) {
        const position = Math.floor(sample * stride);
        hash.update(await readRange(file, position, Math.min(sampleBytes, file.sizeBytes - position)));
      }
    }
    return hash.digest('hex');
  }

  async close(): Promise<void> {
    await closeAll(this.#files);
  }
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

async function closeAll(files: readonly SafetensorsFile[]): Promise<void> {
  await Promise.all(files.map((file) => file.handle.close()));
}

async function openFile(path: string): Promise<SafetensorsFile> {
  let handle: FileHandle;
  try {
    handle = await open(path, 'r');
  } catch (error) {
    const problem = systemErrorCode(error) === 'ENOENT' ? 'is missing' : `cannot be read (${reasonOf(error)})`;
    throw modelInvalid(path, problem, REMEDY, error);
  }
  try {
    const sizeBytes = (await handle.stat()).size;
    const opened = { path, realPath: await realpath(path), handle, sizeBytes };
    if (sizeBytes < 8) throw truncated(path, `it has ${sizeBytes} bytes, less than a header`);
    const headerBytes = (await readRange(opened, 0, 8)).readBigUInt64LE(0);
    if (headerBytes > BigInt(MAX_HEADER_BYTES)) {
      throw modelInvalid(path, `is no safetensors file (its header would have ${headerBytes} bytes)`, REMEDY);
    }
    if (Number(headerBytes) > sizeBytes - 8) {
      throw truncated(path, `its header has ${headerBytes} bytes, the file only ${sizeBytes}`);
    }
    return { ...opened, header: await readRange(opened, 8, Number(headerBytes)) };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

function parseHeader(file: SafetensorsFile): Map<string, StoredTensor> {
  let json: unknown;
  try {
    json = JSON.parse(file.header.toString('utf8'));
  } catch (error) {
    throw modelInvalid(file.path, `its header is not valid JSON (${reasonOf(error)})`, REMEDY, error);
  }
  if (typeof json !== 'object' || json === null) throw modelInvalid(file.path, 'its header is no JSON object', REMEDY);
  const dataStart = 8 + file.header.byteLength;
  const tensors = new Map<string, StoredTensor>();
  for (const [name, value] of Object.entries(json)) {
    if (name === '__metadata__') continue;
    const entry = entrySchema.safeParse(value);
    if (!entry.success) throw modelInvalid(file.path, `its header is damaged at tensor '${name}'`, REMEDY, entry.error);
    const { dtype, shape } = entry.data;
    const [begin, end] = entry.data.data_offsets;
    const elementBytes = ELEMENT_BYTES.get(dtype);
    const expectedBytes = elementBytes === undefined ? end - begin : shape.reduce((a, b) => a * b, elementBytes);
    if (end - begin !== expectedBytes) {
      const problem = `tensor '${name}' of shape [${shape}] and dtype ${dtype} has ${end - begin} bytes`;
      throw modelInvalid(file.path, `${problem}, not ${expectedBytes}`, REMEDY);
    }
    if (dataStart + end > file.sizeBytes) {
      throw truncated(file.path, `tensor '${name}' ends at byte ${dataStart + end} of ${file.sizeBytes}`);
    }
    tensors.set(name, { file, dtype, shape, start: dataStart + begin, byteLength: end - begin });
  }
  let previousEnd = dataStart;
  for (const [name, { start, byteLength }] of [...tensors].sort((a, b) => a[1].start - b[1].start)) {
    if (byteLength === 0) continue;
    if (start < previousEnd) throw modelInvalid(file.path, `tensor '${name}' overlaps another tensor`, REMEDY);
    if (start > previousEnd) throw modelInvalid(file.path, `bytes before tensor '${name}' are of no tensor`, REMEDY);
    previousEnd = start + byteLength;
  }
  if (previousEnd !== file.sizeBytes) {
    throw modelInvalid(file.path, `its last ${file.sizeBytes - previousEnd} bytes are of no tensor`, REMEDY);
  }
  return tensors;
}

async function readRange(
  file: Pick<SafetensorsFile, 'path' | 'handle'>,
  position: number,
  byteLength: number,
): Promise<Buffer> {
  // A fresh ArrayBuffer (no pool), so that typed arrays can be laid over it from offset 0.
  const buffer = Buffer.from(new ArrayBuffer(byteLength));
  let filled = 0;
  while (filled < byteLength) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await file.handle.read(buffer, filled, byteLength - filled, position + filled));
    } catch (error) {
      throw modelInvalid(file.path, `cannot be read (${reasonOf(error)})`, REMEDY, error);
    }
    if (bytesRead === 0) throw truncated(file.path, `it ended while bytes at ${position} were read`);
    filled += bytesRead;
  }
  return buffer;
}

function truncated(path: string, detail: string): Error {
  return modelInvalid(path, `is truncated (${detail})`, REMEDY);
}
