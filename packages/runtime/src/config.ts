/**
 * Owns reading the configuration: flags over environment variables over defaults, checked once at start.
 *
 * Invariants
 * 1. All problems are reported together, each with the flag and the variable that can mend it.
 * 2. A misspelt LAMINA_* variable or flag is a problem, not ignored.
 */
import { parseArgs } from 'node:util';
import { LaminaError } from '@lamina/tensor';
import { type Config, flagOf, LAUNCHER_VARIABLES, SETTINGS, type Service, type SettingName } from './settings.ts';

const NAMES = Object.keys(SETTINGS).filter((name): name is SettingName => Object.hasOwn(SETTINGS, name));

function readFlags(argv: readonly string[], service: Service): Partial<Record<string, string>> {
  const options = Object.fromEntries(
    NAMES.filter((name) => SETTINGS[name].usedBy.some((user) => user === service)).map((name) => [
      flagOf(name),
      { type: 'string' as const },
    ]),
  );
  try {
    const { values } = parseArgs({ args: [...argv], options, strict: true, allowPositionals: false });
    return Object.fromEntries(Object.entries(values).map(([flag, value]) => [flag, String(value)]));
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LaminaError(
      'config_invalid',
      `${reason}; flags of ${service}: ${Object.keys(options)
        .map((flag) => `--${flag}`)
        .join(' ')}`,
      { cause },
    );
  }
}

/**
 * The checked configuration of a service.
 * @throws LaminaError `config_invalid` that lists every problem.
 */
export function readConfig(
  service: Service,
  argv: readonly string[],
  environment: Readonly<Record<string, string | undefined>>,
): Config {
  const flags = readFlags(argv, service);
  const problems: string[] = [];
  const known = new Set<string>([...NAMES.map((name) => SETTINGS[name].env), ...Object.keys(LAUNCHER_VARIABLES)]);
  for (const variable of Object.keys(environment)) {
    if (variable.startsWith('LAMINA_') && !known.has(variable))
      problems.push(`${variable} is no setting of Lamina; see docs/configuration.md`);
  }
  const config: Partial<Record<SettingName, unknown>> = {};
  for (const name of NAMES) {
    const { env, fallback, schema } = SETTINGS[name];
    const flag = flagOf(name);
    const given = flags[flag] ?? (environment[env] || undefined);
    const result = schema.safeParse(given ?? fallback);
    if (result.success) config[name] = result.data;
    else
      problems.push(`--${flag} / ${env}: "${given}" ${result.error.issues.map((issue) => issue.message).join(', ')}`);
  }
  if (problems.length > 0) throw new LaminaError('config_invalid', problems.join('\n'));
  return config as Config;
}

/** The environment of this process; the only reader of process.env. */
export function processEnvironment(): Readonly<Record<string, string | undefined>> {
  return process.env;
}
