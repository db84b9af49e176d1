// Places in the console: `#/page?name=value`. What stands there never leaves the browser.

export function here() {
	const [page, query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s);
	return { page, params: new URLSearchParams(query) };
}

/** The link to a page; empty values are left out. */
export function go(page, values = {}) {
	const params = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== '' && value != null));
	return `#/${page}${params.size ? `?${params}` : ''}`;
}

/** Notes in the address what is shown, without going anywhere. */
export const note = (page, values) => history.replaceState(null, '', go(page, values));

export const permalink = (page, values) => new URL(go(page, values), location.href).href;
