/**
 * Owns the API keys: reading them from a file, and telling which client a key belongs to.
 *
 * Invariants
 * 1. A key is kept as its SHA-256 only, compared in constant time with every entry, and never logged or shown.
 * 2. A file that cannot be used ends the start; an empty one too, since it would lock everybody out.
 */
import { createHash, timingSafeEqual } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { idSchema } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

const MIN_KEY_CHARACTERS = 16;

interface KeyEntry {
  readonly client: string;
  readonly digest: Buffer;
}

const digestOf = (key: string): Buffer => createHash('sha256').update(key).digest();

export class ApiKeys {
  readonly #entries: readonly KeyEntry[];

  private constructor(entries: readonly KeyEntry[]) {
    this.#entries = entries;
  }

  /**
   * Reads lines of `client:key`; empty lines and those that begin with # are skipped.
   * @throws LaminaError `config_invalid`
   */
  static async read(path: string): Promise<ApiKeys> {
    const where = '--api-keys-file (LAMINA_API_KEYS_FILE)';
    let text: string;
    try {
      text = await readFile(path, 'utf8');
    } catch (cause) {
      throw new LaminaError('config_invalid', `${where}: ${path} cannot be read`, { cause });
    }
    const entries: KeyEntry[] = [];
    for (const [index, line] of text.split('\n').entries()) {
      if (line.trim() === '' || line.startsWith('#')) continue;
      const separator = line.indexOf(':');
      const client = line.slice(0, separator).trim();
      const key = line.slice(separator + 1).trim();
      // The line is not shown: it may be a key.
      if (separator < 0 || !idSchema.safeParse(client).success || key.length < MIN_KEY_CHARACTERS) {
        const form = `client:key, the key of ${MIN_KEY_CHARACTERS} characters or more`;
        throw new LaminaError('config_invalid', `${where}: line ${index + 1} of ${path} is not ${form}`);
      }
      entries.push({ client, digest: digestOf(key) });
    }
    if (entries.length === 0) throw new LaminaError('config_invalid', `${where}: ${path} has no key`);
    return new ApiKeys(entries);
  }

  /** The client whose key it is. */
  clientOf(key: string): string | undefined {
    const digest = digestOf(key);
    let client: string | undefined;
    for (const entry of this.#entries) if (timingSafeEqual(entry.digest, digest)) client = entry.client;
    return client;
  }
}
