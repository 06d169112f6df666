/**
 * Owns reading the JSON and text files of a model directory.
 *
 * Invariants
 * 1. A file that is absent, unreadable or not JSON is reported once, by name (model-error.ts).
 * 2. A value is only ever looked at through a schema; an error names the field.
 */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { z } from 'zod';
import { modelInvalid, reasonOf, systemErrorCode } from './model-error.ts';

const RESTORE = 'restore the file from where the model was downloaded';

/** Contents of a file of the model, or null if there is none. Throws model_invalid if it cannot be read. */
export async function readOptionalText(dir: string, name: string): Promise<string | null> {
  const file = join(dir, name);
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    const code = systemErrorCode(error);
    if (code === 'ENOENT') return null;
    if (code === 'ENOTDIR') throw modelInvalid(dir, 'is not a directory', 'give the directory of the model', error);
    throw modelInvalid(file, `cannot be read (${reasonOf(error)})`, 'check its permissions', error);
  }
}

/** The parsed JSON of a file of the model, or null if there is no such file. Throws model_invalid if it is no JSON. */
export async function readOptionalJson(dir: string, name: string): Promise<unknown> {
  const text = await readOptionalText(dir, name);
  if (text === null) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw modelInvalid(join(dir, name), `is not valid JSON (${reasonOf(error)})`, RESTORE, error);
  }
}

/** Like readOptionalJson, but a missing file is model_invalid too. */
export async function readRequiredJson(dir: string, name: string): Promise<unknown> {
  const value = await readOptionalJson(dir, name);
  if (value === null) {
    throw modelInvalid(join(dir, name), 'is missing', 'give the directory of a complete Hugging Face model');
  }
  return value;
}

/** `value` as the schema's type. Throws model_invalid that names the first bad field of the file. */
export function parseFile<T>(dir: string, name: string, schema: z.ZodType<T>, value: unknown): T {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const field = issue === undefined || issue.path.length === 0 ? 'the file' : issue.path.join('.');
  throw modelInvalid(join(dir, name), `${field}: ${issue?.message ?? 'is of the wrong kind'}`, RESTORE, result.error);
}
