// Links within the console: `#/page?name=value`. Browsers do not send the part after `#`.

export function here() {
	const [page, query = ''] = location.hash.replace(/^#\/?/, '').split(/\?(.*)/s);
	return { page, params: new URLSearchParams(query) };
}

/** Returns the link to a page, without empty values. */
export function go(page, values = {}) {
	const params = new URLSearchParams(Object.entries(values).filter(([, value]) => value !== '' && value != null));
	return `#/${page}${params.size ? `?${params}` : ''}`;
}

/** Stores the page's state in the address without navigating. */
export const note = (page, values) => history.replaceState(null, '', go(page, values));

export const permalink = (page, values) => new URL(go(page, values), location.href).href;
