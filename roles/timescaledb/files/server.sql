-- Is any configuration file newer than what the server has loaded, or does a loaded setting wait for a restart? Has the server the
-- database, with its owner?
SELECT
    EXISTS (
        SELECT FROM unnest(ARRAY[
            current_setting('hba_file'),
            current_setting('config_file'),
            regexp_replace(current_setting('config_file'), '[^/]+$', 'conf.d/larder.conf')
        ]) AS file
        WHERE (pg_stat_file(file)).modification > pg_conf_load_time()
    ) OR EXISTS (SELECT FROM pg_settings WHERE pending_restart) AS pending,
    EXISTS (
        SELECT FROM pg_database JOIN pg_roles ON pg_roles.oid = datdba
        WHERE datname = %(database)s AND rolname = %(owner)s
            AND NOT (rolcanlogin OR rolsuper OR rolcreatedb OR rolcreaterole)
    ) AS database
