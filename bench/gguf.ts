/**
 * Owns writing a GGUF file of a published shape with random quantized weights, for llama.cpp.
 *
 * Invariants
 * 1. Every matrix is quantized, the embedding included: what our int8 and int4 quantize, and no more bytes.
 * 2. The file appears whole or not at all.
 */
import { randomFillSync } from 'node:crypto';
import { open, rename } from 'node:fs/promises';
import { float32ToFloat16Bits } from '@lamina/tensor';
import type { Shape } from './models.ts';

const ALIGNMENT = 32;
const VERSION = 3;
const VALUE_TYPE = { uint32: 4, float32: 6, string: 8, array: 9, int32: 5 } as const;
const TENSOR_TYPE = { float32: 0, q4_0: 2, q8_0: 8 } as const;
/** A block: a float16 scale, then 32 weights of 4 or 8 bits. spread: standard deviation of uniform integers of so many. */
const BLOCK_ELEMENTS = 32;
const QUANTIZATIONS = {
  q4_0: { blockBytes: 18, spread: 4.61, fileType: 2 },
  q8_0: { blockBytes: 34, spread: 73.9, fileType: 7 },
} as const;
export type Quantization = keyof typeof QUANTIZATIONS;

class Bytes {
  readonly #parts: Buffer[] = [];

  uint32(value: number): this {
    const bytes = Buffer.alloc(4);
    bytes.writeUInt32LE(value);
    return this.#add(bytes);
  }

  uint64(value: number): this {
    const bytes = Buffer.alloc(8);
    bytes.writeBigUInt64LE(BigInt(value));
    return this.#add(bytes);
  }

  float32(value: number): this {
    const bytes = Buffer.alloc(4);
    bytes.writeFloatLE(value);
    return this.#add(bytes);
  }

  string(value: string): this {
    const bytes = Buffer.from(value);
    return this.uint64(bytes.length).#add(bytes);
  }

  concat(): Buffer {
    return Buffer.concat(this.#parts);
  }

  #add(bytes: Buffer): this {
    this.#parts.push(bytes);
    return this;
  }
}

interface GgufTensor {
  readonly name: string;
  /** Innermost first. */
  readonly dims: readonly number[];
  readonly type: keyof typeof TENSOR_TYPE;
}

const elementsOf = ({ dims }: GgufTensor): number => dims.reduce((product, dim) => product * dim, 1);
const bytesOf = (tensor: GgufTensor): number =>
  tensor.type === 'float32'
    ? 4 * elementsOf(tensor)
    : (elementsOf(tensor) / BLOCK_ELEMENTS) * QUANTIZATIONS[tensor.type].blockBytes;
const aligned = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT;

function tensorsOf(shape: Shape, type: Quantization): GgufTensor[] {
  const { hiddenSize, intermediateSize, vocabSize, numLayers } = shape;
  const queryWidth = shape.numHeads * shape.headDim;
  const kvWidth = shape.numKvHeads * shape.headDim;
  const vector = (name: string, width: number): GgufTensor => ({ name, dims: [width], type: 'float32' });
  const matrix = (name: string, inputs: number, outputs: number): GgufTensor => {
    return { name: `${name}.weight`, dims: [inputs, outputs], type };
  };
  const layers = Array.from({ length: numLayers }, (_, layer) => {
    const prefix = `blk.${layer}`;
    const biases = [
      vector(`${prefix}.attn_q.bias`, queryWidth),
      vector(`${prefix}.attn_k.bias`, kvWidth),
      vector(`${prefix}.attn_v.bias`, kvWidth),
    ];
    return [
      vector(`${prefix}.attn_norm.weight`, hiddenSize),
      matrix(`${prefix}.attn_q`, hiddenSize, queryWidth),
      matrix(`${prefix}.attn_k`, hiddenSize, kvWidth),
      matrix(`${prefix}.attn_v`, hiddenSize, kvWidth),
      ...(shape.modelType === 'qwen2' ? biases : []),
      matrix(`${prefix}.attn_output`, queryWidth, hiddenSize),
      vector(`${prefix}.ffn_norm.weight`, hiddenSize),
      matrix(`${prefix}.ffn_gate`, hiddenSize, intermediateSize),
      matrix(`${prefix}.ffn_up`, hiddenSize, intermediateSize),
      matrix(`${prefix}.ffn_down`, intermediateSize, hiddenSize),
    ];
  });
  return [
    matrix('token_embd', hiddenSize, vocabSize),
    ...layers.flat(),
    vector('output_norm.weight', hiddenSize),
    ...(shape.tied ? [] : [matrix('output', hiddenSize, vocabSize)]),
  ];
}

/** Key-value pairs of the header. @returns how many, and their bytes. */
function metadataOf(shape: Shape, type: Quantization): { count: number; bytes: Buffer } {
  const out = new Bytes();
  let count = 0;
  const key = (name: string, type: keyof typeof VALUE_TYPE): Bytes => {
    count++;
    return out.string(name).uint32(VALUE_TYPE[type]);
  };
  const arch = shape.modelType;
  key('general.architecture', 'string').string(arch);
  key('general.name', 'string').string('random');
  key('general.file_type', 'uint32').uint32(QUANTIZATIONS[type].fileType);
  const integers: Readonly<Record<string, number>> = {
    block_count: shape.numLayers,
    context_length: shape.contextLength,
    embedding_length: shape.hiddenSize,
    feed_forward_length: shape.intermediateSize,
    'attention.head_count': shape.numHeads,
    'attention.head_count_kv': shape.numKvHeads,
    'attention.key_length': shape.headDim,
    'attention.value_length': shape.headDim,
    'rope.dimension_count': shape.headDim,
    vocab_size: shape.vocabSize,
  };
  for (const [name, value] of Object.entries(integers)) key(`${arch}.${name}`, 'uint32').uint32(value);
  key(`${arch}.attention.layer_norm_rms_epsilon`, 'float32').float32(shape.rmsNormEps);
  key(`${arch}.rope.freq_base`, 'float32').float32(shape.ropeTheta);
  key('tokenizer.ggml.model', 'string').string('gpt2');
  key('tokenizer.ggml.pre', 'string').string('gpt-2');
  key('tokenizer.ggml.tokens', 'array').uint32(VALUE_TYPE.string).uint64(shape.vocabSize);
  for (let token = 0; token < shape.vocabSize; token++) out.string(`t${token}`);
  key('tokenizer.ggml.token_type', 'array').uint32(VALUE_TYPE.int32).uint64(shape.vocabSize);
  for (let token = 0; token < shape.vocabSize; token++) out.uint32(1);
  key('tokenizer.ggml.merges', 'array').uint32(VALUE_TYPE.string).uint64(1).string('t1 t2');
  key('tokenizer.ggml.bos_token_id', 'uint32').uint32(shape.vocabSize - 2);
  key('tokenizer.ggml.eos_token_id', 'uint32').uint32(shape.vocabSize - 1);
  return { count, bytes: out.concat() };
}

function dataOf(tensor: GgufTensor): Buffer {
  const data = Buffer.alloc(aligned(bytesOf(tensor)));
  if (tensor.type === 'float32') {
    const value = tensor.name.endsWith('bias') ? 0.01 : 1;
    for (let at = 0; at < elementsOf(tensor) * 4; at += 4) data.writeFloatLE(value, at);
    return data;
  }
  randomFillSync(data);
  const { blockBytes, spread } = QUANTIZATIONS[tensor.type];
  const scale = float32ToFloat16Bits(1 / (spread * Math.sqrt(tensor.dims[0]!)));
  for (let at = 0; at < bytesOf(tensor); at += blockBytes) data.writeUInt16LE(scale, at);
  return data;
}

export async function writeGguf(path: string, shape: Shape, type: Quantization): Promise<void> {
  const tensors = tensorsOf(shape, type);
  const metadata = metadataOf(shape, type);
  const infos = new Bytes();
  let offset = 0;
  for (const tensor of tensors) {
    infos.string(tensor.name).uint32(tensor.dims.length);
    for (const dim of tensor.dims) infos.uint64(dim);
    infos.uint32(TENSOR_TYPE[tensor.type]).uint64(offset);
    offset += aligned(bytesOf(tensor));
  }
  const start = new Bytes().uint32(0x46554747).uint32(VERSION).uint64(tensors.length).uint64(metadata.count).concat();
  const header = Buffer.concat([start, metadata.bytes, infos.concat()]);
  const partial = `${path}.${process.pid}.partial`;
  const file = await open(partial, 'w');
  try {
    await file.write(Buffer.concat([header, Buffer.alloc(aligned(header.length) - header.length)]));
    for (const tensor of tensors) await file.write(dataOf(tensor));
  } finally {
    await file.close();
  }
  await rename(partial, path);
}
