/**
 * Owns the loading of a native addon of ours, and the one checked place where it gets a type.
 *
 * Invariants
 * 1. A module without every expected function is not used: an addon of another version falls back like a missing one.
 */
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

export type LoadedAddon<Addon> = { readonly addon: Addon } | { readonly addon: null; readonly reason: string };

/**
 * Loads the addon at `url`; says why when it cannot.
 * @param functionNames Every function of it.
 */
export function loadNativeModule<Addon extends object>(
  url: URL,
  functionNames: readonly (keyof Addon & string)[],
): LoadedAddon<Addon> {
  const hasAll = (module: unknown): module is Addon => {
    if (typeof module !== 'object' || module === null) return false;
    const entries = new Map(Object.entries(module));
    return functionNames.every((name) => typeof entries.get(name) === 'function');
  };
  let module: unknown;
  try {
    module = createRequire(import.meta.url)(fileURLToPath(url));
  } catch (error) {
    const detail = error instanceof Error ? (error.message.split('\n')[0] ?? '') : String(error);
    const isMissing = error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND';
    return { addon: null, reason: isMissing ? 'the native addon is not built' : `the addon does not load: ${detail}` };
  }
  if (!hasAll(module)) return { addon: null, reason: 'the native addon is of another version; build it again' };
  return { addon: module };
}
