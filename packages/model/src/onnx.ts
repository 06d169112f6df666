/**
 * Owns the ONNX vocabulary of the builder: nodes, values, initializers and models as onnx-proto's plain objects.
 * The only importer of onnx-proto.
 *
 * Invariants
 * 1. Weights are external data by a path relative to the directory that sessions are told of (BuiltModel.dataDir);
 *    only scalars and shapes are inline.
 */
import onnxProto from 'onnx-proto';
import type { StoredTensor, StoredType } from './weight.ts';

const { onnx } = onnxProto;

export type OnnxNode = onnxProto.onnx.INodeProto;
export type OnnxGraph = onnxProto.onnx.IGraphProto;
export type OnnxValueInfo = onnxProto.onnx.IValueInfoProto;
export type OnnxTensor = onnxProto.onnx.ITensorProto;
export type OnnxAttribute = onnxProto.onnx.IAttributeProto;

export const DATA_TYPE = onnx.TensorProto.DataType;
const ATTRIBUTE_TYPE = onnx.AttributeProto.AttributeType;

/** Numbers of element types: what Cast casts to. */
export const FLOAT32_TYPE = DATA_TYPE.FLOAT;
export const INT64_TYPE = DATA_TYPE.INT64;
export const MICROSOFT_DOMAIN = 'com.microsoft';

/** Element types that graph inputs and outputs have. */
export type ElementType = 'float32' | 'int64' | 'int32' | 'bool';

const ELEMENT_TYPES: Readonly<Record<ElementType, number>> = {
  float32: DATA_TYPE.FLOAT,
  int64: DATA_TYPE.INT64,
  int32: DATA_TYPE.INT32,
  bool: DATA_TYPE.BOOL,
};

/** An attribute is an integer unless it is wrapped: { float }, { ints } or { graph }. */
export type AttributeValue =
  | number
  | { readonly float: number }
  | { readonly ints: readonly number[] }
  | { readonly graph: OnnxGraph };

/** A node named after its first output. An empty string stands for an input or output that is left out. */
export function node(
  opType: string,
  input: readonly string[],
  output: readonly string[],
  attributes: Readonly<Record<string, AttributeValue>> = {},
  domain = '',
): OnnxNode {
  return {
    name: `${opType}:${output.find((name) => name !== '') ?? ''}`,
    opType,
    domain,
    input: [...input],
    output: [...output],
    attribute: Object.entries(attributes).map(([name, value]) => attribute(name, value)),
  };
}

function attribute(name: string, value: AttributeValue): OnnxAttribute {
  if (typeof value === 'number') return { name, type: ATTRIBUTE_TYPE.INT, i: value };
  if ('float' in value) return { name, type: ATTRIBUTE_TYPE.FLOAT, f: value.float };
  if ('ints' in value) return { name, type: ATTRIBUTE_TYPE.INTS, ints: [...value.ints] };
  return { name, type: ATTRIBUTE_TYPE.GRAPH, g: value.graph };
}

/** A graph input or output; a string dimension is symbolic. */
export function valueInfo(name: string, elementType: ElementType, dims: readonly (number | string)[]): OnnxValueInfo {
  return {
    name,
    type: {
      tensorType: {
        elemType: ELEMENT_TYPES[elementType],
        shape: { dim: dims.map((dim) => (typeof dim === 'string' ? { dimParam: dim } : { dimValue: dim })) },
      },
    },
  };
}

const STORED_TYPES: Readonly<Record<StoredType, number>> = {
  float32: DATA_TYPE.FLOAT,
  float16: DATA_TYPE.FLOAT16,
  bfloat16: DATA_TYPE.BFLOAT16,
  uint8: DATA_TYPE.UINT8,
  int8: DATA_TYPE.INT8,
};

/** A stored tensor as an initializer of that name; `dims` may be other dims of as many elements. */
export function externalInitializer(name: string, tensor: StoredTensor, dims: readonly number[]): OnnxTensor {
  return {
    name,
    dataType: STORED_TYPES[tensor.type],
    dims: [...dims],
    dataLocation: onnx.TensorProto.DataLocation.EXTERNAL,
    externalData: [
      { key: 'location', value: tensor.location },
      { key: 'offset', value: String(tensor.byteOffset) },
      { key: 'length', value: String(tensor.byteLength) },
    ],
  };
}

/** A float32 scalar as an inline initializer. */
export function floatInitializer(name: string, value: number): OnnxTensor {
  return { name, dataType: DATA_TYPE.FLOAT, dims: [], floatData: [value] };
}

/** Float32 zeros as an inline initializer. */
export function zeroInitializer(name: string, dims: readonly number[]): OnnxTensor {
  const numElements = dims.reduce((a, b) => a * b, 1);
  return { name, dataType: DATA_TYPE.FLOAT, dims: [...dims], rawData: new Uint8Array(numElements * 4) };
}

/** A uint8 scalar as an inline initializer. */
export function byteInitializer(name: string, value: number): OnnxTensor {
  return { name, dataType: DATA_TYPE.UINT8, dims: [], int32Data: [value] };
}

/** Integers (shapes, sizes, indices) as an inline initializer; no dims = a scalar. */
export function int64Initializer(name: string, values: readonly number[], dims: readonly number[]): OnnxTensor {
  return { name, dataType: DATA_TYPE.INT64, dims: [...dims], int64Data: [...values] };
}

/** The bytes of a model: opset 17 and com.microsoft 1, IR version 8. */
export function encodeModel(graph: OnnxGraph): Uint8Array {
  return onnx.ModelProto.encode({
    irVersion: 8,
    producerName: 'lamina',
    opsetImport: [
      { domain: '', version: 17 },
      { domain: MICROSOFT_DOMAIN, version: 1 },
    ],
    graph,
  }).finish();
}

export interface OpsetImport {
  readonly domain: string;
  readonly version: number;
}

/** The bytes of a model whose nodes come from elsewhere and keep the versions of their domains. */
export function encodeModelOf(graph: OnnxGraph, irVersion: number, opsetImport: readonly OpsetImport[]): Uint8Array {
  return onnx.ModelProto.encode({ irVersion, producerName: 'lamina', opsetImport: [...opsetImport], graph }).finish();
}

export function decodeGraph(bytes: Uint8Array): OnnxGraph {
  return onnx.GraphProto.decode(bytes);
}

export function decodeTensor(bytes: Uint8Array): OnnxTensor {
  return onnx.TensorProto.decode(bytes);
}

export function decodeOpsetImport(bytes: Uint8Array): OpsetImport {
  const { domain, version } = onnx.OperatorSetIdProto.decode(bytes);
  return { domain, version: integerOf(version) };
}

/** A 64-bit integer of a decoded message; those of graphs are far below 2^53, but for the ends of slices. */
export function integerOf(value: Integer64 | null | undefined): number {
  if (value === null || value === undefined) return 0;
  return typeof value === 'number' ? value : value.toNumber();
}

type Integer64 = number | { toNumber(): number };
