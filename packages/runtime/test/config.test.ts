/** Flags over variables over defaults, and every mistake reported at once. */
import { describe, expect, test } from 'vitest';
import { readConfig } from '../src/config.ts';
import { flagOf, SERVICES, SETTINGS, type Service, type SettingName } from '../src/settings.ts';

function problemsOf(service: Service, argv: string[], environment: Record<string, string> = {}): string[] {
  try {
    readConfig(service, argv, environment);
    return [];
  } catch (error) {
    const { code, message } = Object(error);
    return code === 'config_invalid' ? String(message).split('\n') : [`${error}`];
  }
}

describe('what counts', () => {
  test('a flag over a variable over the default', () => {
    const variable = { LAMINA_BLOCK_SIZE_TOKENS: '32', LAMINA_KV_DTYPE: 'f32' };
    expect(readConfig('kv-manager', [], {}).blockSizeTokens).toBe(16);
    expect(readConfig('kv-manager', [], variable).blockSizeTokens).toBe(32);
    const config = readConfig('kv-manager', ['--block-size-tokens', '64'], variable);
    expect([config.blockSizeTokens, config.kvDtype]).toEqual([64, 'f32']);
    expect(readConfig('kv-manager', ['--block-size-tokens=64'], variable).blockSizeTokens).toBe(64);
  });

  test('an empty variable is none, an empty flag is a mistake', () => {
    expect(readConfig('gateway', [], { LAMINA_MODEL: '' }).model).toBe('models/lamina-tiny');
    expect(problemsOf('gateway', ['--model', ''])).toEqual(['--model / LAMINA_MODEL: "" must not be empty']);
  });

  test('every default is in its bounds, for every service', () => {
    for (const service of SERVICES) expect(problemsOf(service, [])).toEqual([]);
    expect(Object.keys(readConfig('gateway', [], {})).sort()).toEqual(Object.keys(SETTINGS).sort());
  });

  test('variables that are not ours are left alone', () => {
    expect(
      problemsOf('gateway', [], { PATH: 'x', lamina_model: 'x', MY_LAMINA_X: '1', LAMINA_NATS_SERVER: 'x' }),
    ).toEqual([]);
  });

  test('a flag has the name of its variable, and a service takes the flags it uses', () => {
    const names = Object.keys(SETTINGS) as SettingName[];
    expect(names.map(flagOf)).toContain('kv-budget-bytes');
    expect(new Set(names.map(flagOf)).size).toBe(names.length);
    const wrong = SERVICES.flatMap((service) =>
      names.map((name) => {
        const isTaken = problemsOf(service, [`--${flagOf(name)}=${SETTINGS[name].fallback}`]).length === 0;
        return isTaken === (SETTINGS[name].usedBy as readonly string[]).includes(service) ? [] : [`${service} ${name}`];
      }),
    );
    expect(wrong.flat()).toEqual([]);
  });
});

describe('mistakes', () => {
  test('all are reported together, each with the flag and the variable that mend it', () => {
    const problems = problemsOf(
      'kv-manager',
      ['--block-size-tokens', '12', '--kv-dtyp', 'f32', 'stray', '--request-timeout-ms'],
      { LAMINA_HTTP_PORT: '99999', LAMINA_KV_DTYPES: 'f32', LAMINA_LOG_LEVEL: 'loud' },
    );
    const expected = [
      '--request-timeout-ms needs a value',
      '--kv-dtyp, "stray": no flag of kv-manager, which takes --nats-url',
      'LAMINA_KV_DTYPES is no setting of Lamina',
      '--block-size-tokens / LAMINA_BLOCK_SIZE_TOKENS: "12" must be a multiple of 8',
      '--http-port / LAMINA_HTTP_PORT: "99999" must be from 0 to 65535',
      '--log-level / LAMINA_LOG_LEVEL: "loud"',
    ];
    expect(problems).toHaveLength(expected.length);
    for (const part of expected) expect(problems.filter((problem) => problem.includes(part))).toHaveLength(1);
  });

  test.each([
    ['a misspelt flag', ['--modle', 'x'], '--modle: no flag'],
    ['a misspelt flag with its value inside', ['--modle=x'], '--modle: no flag'],
    ['a flag of another service', ['--kv-budget-bytes', '5'], '--kv-budget-bytes: no flag'],
    ['a short flag', ['-m', 'x'], '-m: no flag'],
    ['a stray word', ['x'], '"x": no flag'],
    ['a word behind --', ['--', 'x'], '"x": no flag'],
    ['a negated flag', ['--no-model'], '--no-model: no flag'],
    ['a name of every object', ['--constructor', 'x'], '--constructor: no flag'],
    ['a flag without its value', ['--model'], '--model needs a value'],
    ['a flag in place of a value', ['--model', '--http-port'], '--model needs a value'],
  ])('%s is one problem', (_, argv, expected) => {
    expect(problemsOf('gateway', argv)).toEqual([expect.stringContaining(expected)]);
  });

  test('a value that begins with "-" is taken behind =', () => {
    expect(readConfig('gateway', ['--model=-x'], {}).model).toBe('-x');
    expect(problemsOf('gateway', ['--http-port=-1'])).toEqual([
      '--http-port / LAMINA_HTTP_PORT: "-1" must be from 0 to 65535',
    ]);
  });

  test('bounds of numbers', () => {
    const ends = {
      '0': true,
      '65535': true,
      '65536': false,
      '-1': false,
      '1.5': false,
      '': true,
      ' 5': false,
      '0x10': false,
    };
    for (const [value, isGood] of Object.entries({ ...ends, '1e3': false, NaN: false, ['9'.repeat(400)]: false }))
      expect([value, problemsOf('gateway', [], { LAMINA_HTTP_PORT: value }).length === 0]).toEqual([value, isGood]);
    for (const [value, isGood] of Object.entries({ '0': false, '8': true, '20': false, '1024': true, '1032': false }))
      expect([value, problemsOf('kv-manager', ['--block-size-tokens', value]).length === 0]).toEqual([value, isGood]);
  });

  test('sizes in bytes, with a suffix or without', () => {
    const size = (value: string): number =>
      readConfig('attention-shard', ['--kv-budget-bytes', value], {}).kvBudgetBytes;
    expect(['1', '1048576', '3k', '3K', '512m', '2g', '8388607g'].map(size)).toEqual([
      1,
      1_048_576,
      3 * 1024,
      3 * 1024,
      512 * 1024 ** 2,
      2 * 1024 ** 3,
      8_388_607 * 1024 ** 3,
    ]);
    const bad = ['0', '0g', 'm', '1.5g', '5t', '2gb', '2 g', '1e9', '8388608g', '9'.repeat(400)];
    expect(bad.filter((value) => problemsOf('attention-shard', ['--kv-budget-bytes', value]).length === 0)).toEqual([]);
    expect(problemsOf('attention-shard', ['--kv-budget-bytes', '8388608g'])).toEqual([
      '--kv-budget-bytes / LAMINA_KV_BUDGET_BYTES: "8388608g" must be from 1 byte to 8388607g',
    ]);
    expect(problemsOf('attention-shard', ['--kv-budget-bytes', '2gb'])[0]).toContain('suffix k, m or g');
  });
});
