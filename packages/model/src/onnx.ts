/**
 * Owns the ONNX vocabulary of the builder: nodes, values, initializers and models as onnx-proto's plain objects.
 * The only importer of onnx-proto.
 *
 * Invariants
 * 1. Weights are external data by file name, relative to the model; only scalars and shapes are inline.
 */
import onnxProto from 'onnx-proto';
import type { Weight } from './weight-layout.ts';

const { onnx } = onnxProto;

export type OnnxNode = onnxProto.onnx.INodeProto;
export type OnnxGraph = onnxProto.onnx.IGraphProto;
export type OnnxValueInfo = onnxProto.onnx.IValueInfoProto;
export type OnnxTensor = onnxProto.onnx.ITensorProto;
type OnnxAttribute = onnxProto.onnx.IAttributeProto;

const DATA_TYPE = onnx.TensorProto.DataType;
const ATTRIBUTE_TYPE = onnx.AttributeProto.AttributeType;

export const MICROSOFT_DOMAIN = 'com.microsoft';
export const WEIGHTS_FILE_NAME = 'weights.bin';

/** Element types that graph inputs and outputs have. */
export type ElementType = 'float32' | 'int64' | 'int32' | 'bool';

const ELEMENT_TYPES: Readonly<Record<ElementType, number>> = {
  float32: DATA_TYPE.FLOAT,
  int64: DATA_TYPE.INT64,
  int32: DATA_TYPE.INT32,
  bool: DATA_TYPE.BOOL,
};

/** An attribute is an integer unless it is wrapped: { float } or { graph }. */
export type AttributeValue = number | { readonly float: number } | { readonly graph: OnnxGraph };

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

/** A weight as an initializer whose data lies in the weights file. */
export function weightInitializer(weight: Weight): OnnxTensor {
  return {
    name: weight.name,
    dataType: DATA_TYPE.FLOAT,
    dims: [...weight.dims],
    dataLocation: onnx.TensorProto.DataLocation.EXTERNAL,
    externalData: [
      { key: 'location', value: WEIGHTS_FILE_NAME },
      { key: 'offset', value: String(weight.byteOffset) },
      { key: 'length', value: String(weight.byteLength) },
    ],
  };
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
