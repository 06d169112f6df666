/**
 * Owns reading a published .onnx file: its graph as decoded messages, its weights as ranges of files.
 *
 * Invariants
 * 1. Weights are never read here: a file of any size is walked field by field, and the bytes of weights are skipped.
 * 2. A weight's range lies inside its file and has the size that its shape and type say.
 * 3. External data lies beside the graph or below it; a location that leads elsewhere is refused.
 */
import { type FileHandle, open, stat } from 'node:fs/promises';
import { dirname, join, normalize } from 'node:path';
import { modelInvalid, reasonOf } from '../model-error.ts';
import {
  decodeGraph,
  decodeOpsetImport,
  decodeTensor,
  integerOf,
  type OnnxGraph,
  type OnnxTensor,
  type OpsetImport,
} from '../onnx.ts';
import { bytesOfElements, inlineBytes } from './element-types.ts';

export interface FileRange {
  /** Absolute path. */
  readonly file: string;
  readonly byteOffset: number;
  readonly byteLength: number;
}

export interface PublishedTensor {
  readonly name: string;
  /** ONNX's number of the element type. */
  readonly dataType: number;
  readonly dims: readonly number[];
  readonly source: Uint8Array | FileRange;
}

export interface PublishedFile {
  readonly path: string;
  readonly irVersion: number;
  readonly opsetImports: readonly OpsetImport[];
  /** Without initializers. */
  readonly graph: OnnxGraph;
  readonly initializers: ReadonlyMap<string, PublishedTensor>;
}

const DAMAGED = 'download the file again';
const WINDOW_BYTES = 1 << 20;
/** Data of an initializer below this size is kept in memory. */
const INLINE_BYTES = 1024;

const WIRE = { varint: 0, fixed64: 1, bytes: 2, fixed32: 5 } as const;
const MODEL_FIELD = { irVersion: 1, graph: 7, opsetImport: 8, functions: 25 } as const;
const GRAPH_FIELD = { initializer: 5, valueInfo: 13, quantization: 14, sparseInitializer: 15 } as const;
const RAW_DATA_FIELD = 9;

/** One field of a message: [start, end) with its tag, `payload` where its contents start. */
interface Field {
  readonly number: number;
  readonly wire: number;
  readonly start: number;
  readonly payload: number;
  readonly end: number;
  /** Of a varint. */
  readonly value: number;
}

/** Throws model_invalid for a file that is no ONNX model, is cut off, or whose weights are not where it says. */
export async function readOnnxFile(path: string): Promise<PublishedFile> {
  const handle = await open(path).catch((error: unknown) => {
    throw modelInvalid(path, `cannot be read (${reasonOf(error)})`, 'check that it exists and its permissions', error);
  });
  try {
    return await new Walk(path, handle, (await handle.stat()).size).read();
  } finally {
    await handle.close();
  }
}

class Walk {
  readonly #path: string;
  readonly #handle: FileHandle;
  readonly #size: number;
  #window: Buffer = Buffer.alloc(0);
  #windowStart = 0;
  readonly #fileSizes = new Map<string, number>();

  constructor(path: string, handle: FileHandle, size: number) {
    this.#path = path;
    this.#handle = handle;
    this.#size = size;
  }

  async read(): Promise<PublishedFile> {
    let irVersion = 0;
    const opsetImports: OpsetImport[] = [];
    let graph: OnnxGraph | undefined;
    const initializers = new Map<string, PublishedTensor>();
    for (let at = 0; at < this.#size; ) {
      const field = await this.#field(at, this.#size);
      at = field.end;
      if (field.number === MODEL_FIELD.irVersion) irVersion = field.value;
      else if (field.number === MODEL_FIELD.opsetImport) {
        opsetImports.push(decodeOpsetImport(await this.#bytes(field.payload, field.end)));
      } else if (field.number === MODEL_FIELD.functions) {
        const remedy = 'inline its functions (onnx.inliner) first';
        throw modelInvalid(this.#path, 'has functions of its own, which are not supported', remedy);
      } else if (field.number === MODEL_FIELD.graph) graph = await this.#graph(field, initializers);
    }
    if (graph === undefined || opsetImports.length === 0) throw this.#damaged('is no ONNX model');
    return { path: this.#path, irVersion, opsetImports, graph, initializers };
  }

  async #graph(graph: Field, initializers: Map<string, PublishedTensor>): Promise<OnnxGraph> {
    const rest: Uint8Array[] = [];
    for (let at = graph.payload; at < graph.end; ) {
      const field = await this.#field(at, graph.end);
      at = field.end;
      if (field.number === GRAPH_FIELD.sparseInitializer) {
        throw modelInvalid(this.#path, 'has sparse initializers, which are not supported', 'use a dense export');
      }
      if (field.number === GRAPH_FIELD.initializer) {
        const tensor = await this.#initializer(field);
        initializers.set(tensor.name, tensor);
      } else if (field.number !== GRAPH_FIELD.valueInfo && field.number !== GRAPH_FIELD.quantization) {
        rest.push(await this.#bytes(field.start, field.end));
      }
    }
    return this.#decoded(() => decodeGraph(Buffer.concat(rest)));
  }

  async #initializer(tensor: Field): Promise<PublishedTensor> {
    const rest: Uint8Array[] = [];
    let raw: FileRange | undefined;
    for (let at = tensor.payload; at < tensor.end; ) {
      const field = await this.#field(at, tensor.end);
      at = field.end;
      const byteLength = field.end - field.payload;
      if (field.number === RAW_DATA_FIELD && byteLength > INLINE_BYTES) {
        raw = { file: this.#path, byteOffset: field.payload, byteLength };
      } else rest.push(await this.#bytes(field.start, field.end));
    }
    const proto = this.#decoded(() => decodeTensor(Buffer.concat(rest)));
    return publishedTensor(this.#path, proto, raw ?? (await this.#external(proto)));
  }

  /** Where the external data of a tensor lies; undefined if it has none. */
  async #external(proto: OnnxTensor): Promise<FileRange | undefined> {
    if ((proto.externalData ?? []).length === 0) return undefined;
    const entries = new Map((proto.externalData ?? []).map(({ key, value }) => [key ?? '', value ?? '']));
    const location = normalize(entries.get('location') ?? '');
    if (location === '.' || location.startsWith('..') || location.startsWith('/')) {
      throw this.#damaged(`external data of ${proto.name} is said to lie at '${location}', outside the model`);
    }
    const file = join(dirname(this.#path), location);
    const size = this.#fileSizes.get(file) ?? (await this.#sizeOf(file));
    this.#fileSizes.set(file, size);
    const byteOffset = Number(entries.get('offset') ?? 0);
    const byteLength = Number(entries.get('length') ?? size - byteOffset);
    if (!(byteOffset >= 0 && byteLength >= 0 && byteOffset + byteLength <= size)) {
      throw modelInvalid(
        file,
        `is ${size} bytes long, but ${proto.name} should end at ${byteOffset + byteLength}`,
        DAMAGED,
      );
    }
    return { file, byteOffset, byteLength };
  }

  async #sizeOf(file: string): Promise<number> {
    try {
      return (await stat(file)).size;
    } catch (error) {
      throw modelInvalid(
        file,
        `cannot be read (${reasonOf(error)}); ${this.#path} keeps weights in it`,
        DAMAGED,
        error,
      );
    }
  }

  async #field(start: number, end: number): Promise<Field> {
    const head = await this.#bytes(start, Math.min(start + 20, end));
    const tag = varint(head, 0);
    const wire = tag.value & 7;
    const number = Math.floor(tag.value / 8);
    const payload = start + tag.bytes;
    let [contents, fieldEnd, value] = [payload, payload, 0];
    if (wire === WIRE.fixed32) fieldEnd += 4;
    else if (wire === WIRE.fixed64) fieldEnd += 8;
    else if (wire === WIRE.varint || wire === WIRE.bytes) {
      const second = varint(head, tag.bytes);
      value = second.value;
      contents += wire === WIRE.bytes ? second.bytes : 0;
      fieldEnd += second.bytes + (wire === WIRE.bytes ? second.value : 0);
    } else throw this.#damaged('is no ONNX model');
    if (tag.bytes === 0 || number === 0 || fieldEnd > end || fieldEnd === payload) {
      throw this.#damaged('is cut off or no ONNX model');
    }
    return { number, wire, start, payload: contents, end: fieldEnd, value };
  }

  async #bytes(start: number, end: number): Promise<Uint8Array> {
    const windowEnd = this.#windowStart + this.#window.byteLength;
    if (start < this.#windowStart || end > windowEnd) {
      const size = Math.min(Math.max(end - start, WINDOW_BYTES), this.#size - start);
      const window = Buffer.alloc(size);
      const { bytesRead } = await this.#handle.read(window, 0, size, start);
      if (bytesRead < end - start) throw this.#damaged('is cut off');
      this.#window = window.subarray(0, bytesRead);
      this.#windowStart = start;
    }
    return Uint8Array.prototype.slice.call(this.#window, start - this.#windowStart, end - this.#windowStart);
  }

  #decoded<T>(decode: () => T): T {
    try {
      return decode();
    } catch (error) {
      throw modelInvalid(this.#path, `is no ONNX model (${reasonOf(error)})`, DAMAGED, error);
    }
  }

  #damaged(problem: string): Error {
    return modelInvalid(this.#path, problem, DAMAGED);
  }
}

/** A decoded tensor; `range` where its data was not decoded with it. */
export function publishedTensor(path: string, proto: OnnxTensor, range?: FileRange): PublishedTensor {
  const name = proto.name ?? '';
  const dims = (proto.dims ?? []).map(integerOf);
  const dataType = proto.dataType ?? 0;
  const byteLength = bytesOfElements(
    dataType,
    dims.reduce((a, b) => a * b, 1),
  );
  if (byteLength === undefined) {
    throw modelInvalid(
      path,
      `tensor ${name} has element type ${dataType}, which is not supported`,
      'use another variant',
    );
  }
  const source = range ?? inlineBytes(proto, dataType);
  if (source.byteLength !== byteLength) {
    const problem = `tensor ${name} [${dims}] should have ${byteLength} bytes and has ${source.byteLength}`;
    throw modelInvalid(path, problem, DAMAGED);
  }
  return { name, dataType, dims, source };
}

function varint(bytes: Uint8Array, start: number): { value: number; bytes: number } {
  let value = 0;
  for (let i = start, factor = 1; i < bytes.byteLength && i < start + 10; i++, factor *= 128) {
    value += (bytes[i]! & 127) * factor;
    if (bytes[i]! < 128) return { value, bytes: i + 1 - start };
  }
  return { value: 0, bytes: 0 };
}
