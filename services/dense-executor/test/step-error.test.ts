/** What is said of a step that fails: what ONNX Runtime and V8 throw when memory is short is told from all else. */
import { encodeModelOf, type OnnxGraph } from '@lamina/model';
import { LaminaError } from '@lamina/tensor';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { expect, test } from 'vitest';
import { stepError } from '../src/worker/step-error.ts';

const INT64 = 7;
const FLOAT = 1;

const value = (name: string, elemType: number) => ({
  name,
  type: { tensorType: { elemType, shape: { dim: [{ dimParam: 'n' }] } } },
});
/** As many zeros as its input says. */
const ZEROS: OnnxGraph = {
  name: 'zeros',
  node: [{ opType: 'ConstantOfShape', input: ['shape'], output: ['zeros'] }],
  input: [value('shape', INT64)],
  output: [value('zeros', FLOAT)],
};

test.each([
  [
    'ONNX Runtime gets no memory',
    async () => {
      const session = await InferenceSession.create(encodeModelOf(ZEROS, 8, [{ domain: '', version: 13 }]), {
        logSeverityLevel: 4,
      });
      await session.run({ shape: new Tensor('int64', BigInt64Array.of(2n ** 45n), [1]) });
    },
  ],
  ['V8 gets no memory', async () => new ArrayBuffer(2 ** 52)],
  ['the C++ library gets no memory', async () => Promise.reject(new Error('std::bad_alloc'))],
])('%s: overloaded, with what to do', async (_, run) => {
  const thrown = await run().catch((cause: unknown) => cause);
  expect(thrown).toBeInstanceOf(Error);
  expect(stepError(thrown)).toMatchObject({
    code: 'overloaded',
    message: expect.stringMatching(/^the dense-executor is short of memory .* LAMINA_MAX_BATCHED_TOKENS.*$/),
  });
});

test('anything else of theirs is internal with its reason; what is ours stays', () => {
  expect(stepError(new Error('Got invalid dimensions\nfor input'))).toMatchObject({
    code: 'internal',
    message: 'a step failed in the dense-executor: Got invalid dimensions for input',
  });
  const ours = new LaminaError('unavailable', 'the step was aborted', { diagnostics: { shardIds: ['a'] } });
  expect(stepError(ours)).toBe(ours);
  const late = new LaminaError('config_invalid', 'max_payload of nats-server is 9');
  expect(stepError(late)).toMatchObject({ code: 'internal', message: 'max_payload of nats-server is 9' });
});
