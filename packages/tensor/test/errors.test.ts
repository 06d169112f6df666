import { expect, test } from 'vitest';
import { asLaminaError, ERROR_CODES, isErrorCode, LaminaError } from '../src/errors.ts';

test('the set of codes is closed', () => {
  // A code that is added or dropped changes what clients can rely on: change this list knowingly.
  expect(Object.keys(ERROR_CODES).sort()).toEqual([
    'address_in_use',
    'config_invalid',
    'context_length_exceeded',
    'deadline_exceeded',
    'duplicate_id',
    'internal',
    'invalid_request',
    'kv_capacity_exceeded',
    'model_invalid',
    'nats_unreachable',
    'numeric_error',
    'overloaded',
    'protocol_violation',
    'shard_lost',
    'unauthorized',
    'unavailable',
    'unknown_model',
    'unknown_request',
  ]);
  const notCodes = ['', 'Internal', 'toString', 'constructor', '__proto__', 5, null, undefined, ['internal']];
  expect(notCodes.filter(isErrorCode)).toEqual([]);
  expect(Object.keys(ERROR_CODES).every(isErrorCode)).toBe(true);
});

test('what may be retried is answered with a status that says so, and nothing else is', () => {
  const facts = Object.values(ERROR_CODES);
  expect(facts.map(({ retryable }) => retryable)).toEqual(
    facts.map(({ httpStatus }) => httpStatus === 429 || httpStatus === 503),
  );
  const error = new LaminaError('overloaded', 'full');
  expect([error.retryable, error.httpStatus, error.name]).toEqual([true, 429, 'LaminaError']);
});

test('an error keeps its cause and its diagnostics, and has none that were not given', () => {
  const cause = new Error('why');
  const error = new LaminaError('unavailable', 'gone', { cause, diagnostics: { shard: 's1' } });
  expect([error.cause, error.diagnostics, error.message]).toEqual([cause, { shard: 's1' }, 'gone']);
  expect('cause' in new LaminaError('internal', '')).toBe(false);
});

test('one of ours passes through; another becomes internal with itself as the cause and only there', () => {
  const ours = new LaminaError('shard_lost', 'gone');
  expect(asLaminaError(ours)).toBe(ours);
  const foreign = new TypeError('secret path /x');
  const error = asLaminaError(foreign);
  expect([error.code, error.cause, error.diagnostics]).toEqual(['internal', foreign, { reason: 'secret path /x' }]);
  expect(error.message).not.toContain('secret');
  for (const thrown of ['text', 5, null, undefined, { code: 'overloaded' }]) {
    expect([asLaminaError(thrown).code, asLaminaError(thrown).diagnostics]).toEqual([
      'internal',
      { reason: String(thrown) },
    ]);
  }
});
